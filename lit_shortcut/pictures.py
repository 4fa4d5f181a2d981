"""From conditions to pictures: what the command and the Python pipeline share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Accelerated, Predictor, Vanilla
from lit_shortcut.acceleration.plans import Even, EvenTokens
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.contracts import Acceleration, Conditions, MaskedImageModel, Step
from lit_shortcut.metrics.latency import synchronize
from lit_shortcut.sampling import Decoding, generate
from lit_shortcut.weights import replacing

PlanName = Literal["even", "even_tokens"]
_PLANS: dict[str, Callable[[int], Even | EvenTokens]] = {"even": Even, "even_tokens": EvenTokens}

LEAST_SEED, MOST_SEED = -(2**63), 2**63 - 1


class Drawing(NamedTuple):
    """Pictures of one batch.

    ``images``, uint8 (B, 3, H, W), codes ``tokens`` (B, L), and base passes ``full_steps`` (B,). ``latency_ms`` is that
    of the decoding loop, without the image decoder, for each image. ``log_probs`` as in
    :class:`~lit_shortcut.sampling.Generated`.
    """

    images: Tensor
    tokens: Tensor
    full_steps: Tensor
    latency_ms: float
    log_probs: Tensor | None = None


def draw(
    base: MaskedImageModel,
    conditions: Conditions,
    decoding: Decoding,
    acceleration: Acceleration,
    *,
    log_probs: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> Drawing:
    """Draw, decode and time one batch; see :func:`~lit_shortcut.sampling.generate` for the arguments."""
    device = conditions.seeds.device
    synchronize(device)
    start = time.perf_counter()
    drawn = generate(base, conditions, decoding, acceleration, log_probs=log_probs, on_step=on_step)
    synchronize(device)
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        images = base.decode(drawn.tokens)
    return Drawing(images, drawn.tokens, drawn.full_steps, 1000 * seconds / len(images), drawn.log_probs)


def acceleration_of(
    predictor: Predictor | None, plan: PlanName, budget: int | None, num_steps: int
) -> Vanilla | Accelerated:
    """Return what computes the features of ``num_steps`` (N) steps: vanilla if ``budget`` is None or N.

    Raises:
        ValueError: if the plan is unknown, ``budget`` lies outside 1..N, there is no predictor for what it leaves out,
            or the predictor is a shortcut trained for another N.
    """
    if plan not in _PLANS:
        raise ValueError(f"plan must be one of {', '.join(get_args(PlanName))}; got {plan!r}")
    if budget is not None and not 1 <= budget <= num_steps:
        raise ValueError(f"budget must lie in 1..{num_steps}, the number of steps; got {budget}")
    if budget is None or budget == num_steps:
        return Vanilla()
    if predictor is None:
        raise ValueError(f"a budget of {budget} of {num_steps} steps needs a shortcut for the others; none was given")
    if isinstance(predictor, Shortcut):
        predictor.origin.require_steps(num_steps)
    return Accelerated(_PLANS[plan](budget), predictor)


def conditions_of(
    base: MaskedImageModel,
    prompts: Sequence[str],
    labels: Sequence[int],
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
) -> Conditions:
    """Return the conditions of one batch, an image for each of ``prompts`` or ``labels``.

    Raises:
        ValueError: if not exactly one of the two is given, the base takes the other, there is not a seed for each, or a
            seed is outside 64 bits.
    """
    require_wanted(base, takes_prompts=bool(prompts), takes_labels=bool(labels))
    count = len(prompts) or len(labels)
    if len(seeds) != count:
        raise ValueError(f"expected a seed for each of {count} images, got {len(seeds)}")
    require_seeds(seeds)
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
    """Raise ValueError if one of ``seeds`` is no 64-bit integer with sign."""
    if outside := [seed for seed in seeds if not LEAST_SEED <= seed <= MOST_SEED]:
        raise ValueError(f"seed must lie in -2**63..2**63-1, 64 bits with sign; got {outside[0]}")


def settings_of(base: MaskedImageModel, decoding: Decoding, acceleration: Acceleration) -> dict[str, Any]:
    """Return all that a picture follows from besides its seed and what was asked for, as JSON values."""
    identity = {"budget": decoding.num_steps} | acceleration.identity()
    return {"base": base.identity(), "decoding": asdict(decoding), "acceleration": identity}


def name_of(decoding: Decoding, acceleration: Acceleration) -> str:
    """Return a short name, as in tables: ``vanilla_n8``, ``shortcut_n8_b3``."""
    identity = acceleration.identity()
    budget = f"_b{identity['budget']}" if "budget" in identity else ""
    return f"{identity['method'].replace(' ', '')}_n{decoding.num_steps}{budget}"


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return ``images``, uint8 (B, 3, H, W), as PIL images."""
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images.cpu()]


def write_png(path: Path, image: Image.Image, settings: Mapping[str, Any]) -> None:
    """Write ``image`` to ``path`` with ``settings`` as text chunks, whole or not at all."""
    info = PngInfo()
    for name, value in settings.items():
        info.add_text(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    with replacing(path) as aside, aside.open("wb") as file:
        image.save(file, format="PNG", pnginfo=info)
