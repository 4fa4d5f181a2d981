"""From conditions to pictures: what the command and the Python pipeline share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Predictor
from lit_shortcut.acceleration.calibrated import Calibrated
from lit_shortcut.acceleration.origin import PLAN
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.contracts import Conditions, MaskedImageModel, Step
from lit_shortcut.evaluation.identity import acceleration_identity
from lit_shortcut.evaluation.rows import NamedPlan, Row, build_rows, vanilla_row
from lit_shortcut.files import replacing
from lit_shortcut.metrics.latency import synchronize
from lit_shortcut.sampling import Decoding, LogProbs, generate

PlanName = Literal["even", "early", "calibrated"]
"""Plans by name; ``calibrated`` is read from ``plan.json`` beside a shortcut."""

LEAST_SEED, MOST_SEED = -(2**63), 2**63 - 1


class Drawing(NamedTuple):
    """Pictures of one batch.

    ``images``, uint8 (B, 3, H, W), codes ``tokens`` (B, L), and base passes ``full_steps`` (B,). ``latency_ms`` is
    per image for the decoding loop, without the image decoder. ``log_probs`` are those of
    :class:`~lit_shortcut.sampling.LogProbs`.
    """

    images: Tensor
    tokens: Tensor
    full_steps: Tensor
    latency_ms: float
    log_probs: Tensor | None = None


def draw(
    base: MaskedImageModel,
    conditions: Conditions,
    row: Row,
    *,
    log_probs: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> Drawing:
    """Draw, decode and time one batch.

    Args:
        base: the frozen model.
        conditions: what to draw.
        row: how to draw it.
        log_probs: return the tokens' log-probabilities, too.
        on_step: called after each step, for progress.
    """
    gathered = LogProbs() if log_probs else None
    callbacks = [callback for callback in (gathered, on_step) if callback is not None]

    def called(step: Step) -> None:
        for callback in callbacks:
            callback(step)

    device = conditions.seeds.device
    synchronize(device)
    start = time.perf_counter()
    tokens, full_steps = generate(base, conditions, row.decoding, row.acceleration, on_step=called)
    synchronize(device)
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        images = base.decode(tokens)
    latency_ms = 1000 * seconds / len(images)
    return Drawing(images, tokens, full_steps, latency_ms, None if gathered is None else gathered.gathered())


def row_of(predictor: Predictor | None, plan: PlanName, budget: int | None, decoding: Decoding) -> Row:
    """Return the row that runs the base at ``budget`` of the steps: vanilla if that is None or N.

    Raises:
        ValueError: if the plan is unknown, ``budget`` lies outside 1..N, there is no predictor for the other steps, or
            the plan is ``calibrated`` and there is no ``plan.json`` beside the shortcut.
        WeightsError: if the predictor is a shortcut trained for another N.
    """
    num_steps = decoding.num_steps
    if budget is None or budget == num_steps:
        return vanilla_row(decoding)
    if predictor is None:
        raise ValueError(f"a budget of {budget} of {num_steps} steps needs a shortcut for the others; none was given")
    plans = dict[str, NamedPlan]()
    if not isinstance(predictor, Shortcut):
        method = str(predictor.identity()["method"]).replace(" ", "")
    else:
        method = "shortcut"  # its identity would hash all weights, at every batch
        predictor.origin.require_steps(num_steps)
        if predictor.folder is not None and (predictor.folder / PLAN).is_file():
            plans["calibrated"] = partial(Calibrated, path=predictor.folder / PLAN)
    if plan == "calibrated" and plan not in plans:
        raise ValueError(f"plan calibrated needs the {PLAN} that a search writes beside a shortcut; found none")
    return build_rows([[num_steps, budget, method, plan]], decoding, {method: predictor}, plans)[0]


def conditions_of(
    base: MaskedImageModel,
    prompts: Sequence[str],
    labels: Sequence[int],
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
) -> Conditions:
    """Return the conditions of one batch, an image for each of ``prompts`` or ``labels``.

    Raises:
        ValueError: if not exactly one of the two is given, the base takes the other, there is not one seed per image,
            a seed is outside 64 bits, or a label is no class of the base.
    """
    require_wanted(base, takes_prompts=bool(prompts), takes_labels=bool(labels))
    count = len(prompts) or len(labels)
    if len(seeds) != count:
        raise ValueError(f"expected a seed for each of {count} images, got {len(seeds)}")
    require_seeds(seeds)
    if outside := [label for label in labels if not 0 <= label < base.spec.num_classes]:
        raise ValueError(f"class labels must lie in 0..{base.spec.num_classes - 1}; got {outside}")
    ids = torch.arange(count, device=device)
    numbers = torch.tensor(labels, device=device) if labels else ids
    return Conditions(ids, torch.tensor(list(seeds), dtype=torch.int64, device=device), numbers, tuple(prompts))


def require_wanted(base: MaskedImageModel, *, takes_prompts: bool, takes_labels: bool) -> None:
    """Raise ValueError unless what is asked for, prompts or labels, is what ``base`` takes."""
    kind = "prompts" if base.spec.num_classes == 0 else f"labels in 0..{base.spec.num_classes - 1}"
    if takes_prompts == takes_labels:
        raise ValueError(f"expected either prompts or labels, got {'both' if takes_prompts else 'neither'}")
    if takes_prompts != (base.spec.num_classes == 0):
        raise ValueError(f"this base takes {kind}, got {'prompts' if takes_prompts else 'labels'}")


def require_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError if one of ``seeds`` is not a signed 64-bit integer."""
    if outside := [seed for seed in seeds if not LEAST_SEED <= seed <= MOST_SEED]:
        raise ValueError(f"seed must lie in -2**63..2**63-1, signed 64 bits; got {outside[0]}")


def settings_of(base: MaskedImageModel, row: Row) -> dict[str, Any]:
    """Return everything that determines a picture besides its seed and its prompt or label, as JSON values."""
    acceleration = {"budget": row.budget} | acceleration_identity(base, row)
    return {"base": base.identity(), "decoding": asdict(row.decoding), "acceleration": acceleration}


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return ``images``, uint8 (B, 3, H, W), as PIL images."""
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images.cpu()]


def write_png(path: Path, image: Image.Image, settings: Mapping[str, Any]) -> None:
    """Write ``image`` to ``path`` with ``settings`` as text chunks, atomically."""
    info = PngInfo()
    for name, value in settings.items():
        info.add_text(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    with replacing(path) as aside, aside.open("wb") as file:
        image.save(file, format="PNG", pnginfo=info)
