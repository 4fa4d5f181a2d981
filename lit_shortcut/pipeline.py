"""From a prompt to a picture in Python: ``load`` a base with its shortcut, call it, take the images."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from lit_shortcut.acceleration.accelerated import Predictor
from lit_shortcut.acceleration.origin import CONFIG, BaseReference
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.contracts import MaskedImageModel
from lit_shortcut.hub import at_revision
from lit_shortcut.inputs import located
from lit_shortcut.pictures import Drawing, PlanName, conditions_of, draw, row_of, to_pil
from lit_shortcut.sampling import Decoding
from lit_shortcut.weights import Precision, WeightsError

BASES = {
    "fashion": "lit_shortcut.fashion.embedded:fashion",
    "fashion_text": "lit_shortcut.fashion.embedded:fashion_text",
    "maskgit": "lit_shortcut.bases.maskgit.imagenet:published",
    "halton": "lit_shortcut.bases.halton.imagenet:published",
    "dimoo": "lit_shortcut.bases.dimoo.published:published",
    "mmada": "lit_shortcut.bases.mmada.published:published",
    "amused": "lit_shortcut.bases.amused:published",
    "meissonic": "lit_shortcut.bases.meissonic.published:published",
}
"""Functions that build a base, by its name in a shortcut's ``config.json``; nothing else is imported to build one."""

FOLDER = "shortcut"
"""Folder of the shortcut within an embedded base's folder."""


@dataclass(frozen=True)
class Pictures:
    """Drawn images, with their tokens and costs.

    Args:
        images: PIL images.
        tokens: codes (B, L).
        full_steps: base passes for each image (B,).
        latency_ms: latency per image of the decoding loop; a first call includes the device's start-up.
        log_probs: float32 log-probabilities (B, L) of the tokens under the policy that drew them; None by default.
    """

    images: list[Image.Image]
    tokens: Tensor
    full_steps: Tensor
    latency_ms: float
    log_probs: Tensor | None = None


class Pipeline:
    """A frozen base with what accelerates it; call it with prompts, or with ``labels`` where the base takes classes.

    Args:
        base: the frozen model.
        decoding: how tokens are drawn.
        shortcut: computes the features of the steps that the base skips; None allows only vanilla.
        plan: which steps the base computes.
        budget: b, the number of those steps; None is all steps.

    Raises:
        ValueError: if the budget lies outside 1..N, or the shortcut is for another N.
        WeightsError: if the shortcut was trained for another base.
    """

    def __init__(
        self,
        base: MaskedImageModel,
        decoding: Decoding | None = None,
        shortcut: Predictor | None = None,
        plan: PlanName = "even",
        budget: int | None = None,
    ) -> None:
        self.base, self.decoding, self.shortcut = base, decoding or Decoding(), shortcut
        self.plan: PlanName = plan
        self.budget = None if budget == self.decoding.num_steps else budget
        if isinstance(shortcut, Shortcut):
            shortcut.require_fit(base)  # before the number of steps: another base is the better explanation
        row_of(shortcut, plan, self.budget, self.decoding)

    @property
    def device(self) -> torch.device:
        """Device of the base."""
        return self.base.interface.code_embedding.device

    def to(self, device: torch.device | str) -> Pipeline:
        """Move base and shortcut to ``device``, in place; return the pipeline."""
        modules: list[Any] = [self.base, self.shortcut]
        for module in modules:
            if isinstance(module, nn.Module):
                module.to(device)
        return self

    def __call__(
        self,
        prompts: str | Sequence[str] = (),
        *,
        labels: int | Sequence[int] = (),
        seeds: int | Sequence[int] | None = None,
        num_steps: int | None = None,
        budget: int | None = None,
        batch_size: int | None = None,
        log_probs: bool = False,
    ) -> Pictures:
        """Draw an image for each of ``prompts``, or of ``labels``.

        An image depends on its prompt or label, its seed and the settings, not on the other images.

        Args:
            prompts: texts.
            labels: classes, for a base without prompts.
            seeds: one for each image, 64-bit integers; None is 0, 1, 2, ….
            num_steps: N; None is the decoding's own.
            budget: b of N steps that the base computes, N for vanilla; None is the pipeline's own.
            batch_size: images drawn at once; None is all of them.
            log_probs: return the tokens' log-probabilities, too.

        Raises:
            ValueError: if neither or both are given, the base takes the other, a prompt or label does not fit the base,
                there is not one seed per image, a seed is outside 64 bits, or the budget lies outside 1..N.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        classes = [labels] if isinstance(labels, int) else list(labels)
        count = len(texts) or len(classes)
        numbers = range(count) if seeds is None else [seeds] if isinstance(seeds, int) else list(seeds)
        conditions = conditions_of(self.base, texts, classes, numbers, self.device)
        decoding = self.decoding if num_steps is None else self.decoding.at(num_steps)
        budget = self.budget if budget is None else budget
        row = row_of(self.shortcut, self.plan, budget, decoding)
        size = count if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size must be at least 1, got {size}")
        drawn = [
            draw(self.base, conditions.slice(start, start + size), row, log_probs=log_probs)
            for start in range(0, count, size)
        ]
        return _joined(drawn)


def _joined(drawn: list[Drawing]) -> Pictures:
    count = sum(len(batch.images) for batch in drawn)
    known = [batch.log_probs for batch in drawn if batch.log_probs is not None]
    return Pictures(
        images=[image for batch in drawn for image in to_pil(batch.images)],
        tokens=torch.cat([batch.tokens for batch in drawn]).cpu(),
        full_steps=torch.cat([batch.full_steps for batch in drawn]).cpu(),
        latency_ms=sum(batch.latency_ms * len(batch.images) for batch in drawn) / count,
        log_probs=torch.cat(known).cpu() if known else None,
    )


def load(
    source: str | Path,
    budget: int | None = None,
    *,
    base: MaskedImageModel | None = None,
    num_steps: int | None = None,
    device: torch.device | str | None = None,
    dtype: Precision | None = None,
    revision: str | None = None,
) -> Pipeline:
    """Load a shortcut with its base, ready to draw.

    >>> pipe = load("checkpoints/fashion_text", budget=3)
    >>> pipe(["a dark, wide coat"], seeds=[1]).full_steps
    tensor([3])

    Args:
        source: the folder of a shortcut or its address on the hub (``owner/repository``), the folder of a base that
            holds one in ``shortcut``, or a file of :meth:`Shortcut.load`.
        budget: b, steps that the base computes; None takes the shortcut's own, or all steps if it has none.
        base: the base to accelerate; None builds the one that the shortcut names.
        num_steps: N; None takes that of the shortcut's trajectories.
        device: device to run on; None takes that of ``base``, or without one a GPU if there is one.
        dtype: dtype that the shortcut runs in; None takes float32.
        revision: revision of the shortcut's repository.

    Raises:
        WeightsError: if a file is unavailable or damaged, the base is unknown, or the shortcut is for another one.
        ValueError: if the budget lies outside 1..N.
    """
    where, shortcut = _shortcut_at(source, dtype, revision)
    origin = shortcut.origin
    try:
        decoding = Decoding.from_values(origin.decoding)
    except ValueError as error:
        raise WeightsError(f"{where}: decoding: {error}") from error
    decoding = decoding.at(origin.num_steps or decoding.num_steps if num_steps is None else num_steps)
    pipeline = Pipeline(
        build_base(origin.base, where) if base is None else base,
        decoding,
        shortcut,
        cast(PlanName, origin.plan),
        budget if budget is not None else origin.budget or None,
    )
    if device is None:
        device = "cuda" if base is None and torch.cuda.is_available() else pipeline.device
    return pipeline.to(device)


def _shortcut_at(source: str | Path, dtype: Precision | None, revision: str | None) -> tuple[Path, Shortcut]:
    path = located(source)
    if path.suffix in (".ckpt", ".safetensors"):
        return path, Shortcut.load(path, dtype)
    if path.is_dir() and not (path / CONFIG).is_file() and (path / FOLDER / CONFIG).is_file():
        path = path / FOLDER
    shortcut = Shortcut.from_pretrained(path if path.is_dir() else str(source), revision=revision, dtype=dtype)
    return shortcut.folder or path, shortcut


def build_base(reference: BaseReference, folder: Path) -> MaskedImageModel:
    """Build the base that ``reference`` names; a source that is not an address is relative to ``folder``.

    Raises:
        WeightsError: if its name is unknown, an argument does not fit, or its weights are unavailable or damaged.
    """
    if reference.name not in BASES:
        named = (
            f"its base is {reference.name!r}, expected one of {', '.join(BASES)}" if reference.name else "names no base"
        )
        raise WeightsError(f"{folder}: {named}; pass the base itself: load(…, base=…)")
    source = reference.source
    if source.startswith("hf://"):
        source = at_revision(source, reference.revision)
    elif source:
        path, here = (folder / source).resolve(), Path.cwd()
        source = str(located(path.relative_to(here)) if path.is_relative_to(here) else path)
    module, _, function = BASES[reference.name].partition(":")
    arguments: list[Any] = [source] if source else []
    try:
        return cast(
            MaskedImageModel, getattr(importlib.import_module(module), function)(*arguments, **reference.arguments)
        )
    except WeightsError:
        raise
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{folder}: base.arguments of {reference.name}: {error}") from error
