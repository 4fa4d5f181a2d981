"""The one decoding loop: vanilla, accelerated, recorded, previewed and timed generation all consume it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_shortcut.contracts import Acceleration, Conditions, Control, MaskedImageModel, State, Step, TokenSpec
from lit_shortcut.decoding.halton import halton_order, roll_order
from lit_shortcut.decoding.schedules import Schedule, tokens_per_step
from lit_shortcut.decoding.unmasking import Choice, confidence, guide, sample_codes, uniforms_at

Order = Literal["confidence", "halton", "halton_rolled"]
Course = Literal["linear", "constant"]


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn. The defaults are those of MaskGIT at 512×512 (arXiv 2310.14400).

    Args:
        num_steps: N, steps of the decoding loop.
        schedule: shape of the number of tokens each step commits.
        guidance: classifier-free guidance at the last step; 0 runs one branch alone.
        guidance_course: whether guidance rises linearly from 0, or is constant.
        temperature: logits are multiplied by its inverse before codes are drawn; 0 takes the most probable code.
        confidence_noise: scale of the Gumbel noise on confidences at step 0.
        noise_course: whether that scale falls linearly to 0, or is constant.
        order: which places are committed first: the most confident; or those of a fixed order of low discrepancy over
            the grid (:func:`~lit_shortcut.decoding.halton.halton_order`), for all images the same or, rolled, begun
            at a place of each image's own. Those two know no confidence, nor its noise.
    """

    num_steps: int = 15
    schedule: Schedule = "arccos"
    guidance: float = 2.8
    guidance_course: Course = "linear"
    temperature: float = 1.0
    confidence_noise: float = 7.0
    noise_course: Course = "linear"
    order: Order = "confidence"

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}; got {self.order!r}")
        for name in ("temperature", "confidence_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("guidance_course", "noise_course"):
            if getattr(self, name) not in get_args(Course):
                raise ValueError(f"{name} must be one of {', '.join(get_args(Course))}; got {getattr(self, name)!r}")

    @property
    def is_guided(self) -> bool:
        """Whether there is guidance at all."""
        return self.guidance != 0

    @property
    def branches(self) -> int:
        """G, branches of a pass: conditional and unconditional, or the conditional alone."""
        return 2 if self.is_guided else 1

    def at(self, num_steps: int) -> Decoding:
        """The same in ``num_steps`` steps."""
        return replace(self, num_steps=num_steps)

    def progress(self, step: int) -> float:
        """0 at the first step, 1 at the last; 0 where there is one step alone."""
        return step / max(1, self.num_steps - 1)

    def guidance_at(self, step: int) -> float:
        """Scale of the guidance at ``step``."""
        return self.guidance * (self.progress(step) if self.guidance_course == "linear" else 1)

    def noise_at(self, step: int) -> float:
        """Scale of the noise on confidences at ``step``."""
        return self.confidence_noise * (1 - self.progress(step) if self.noise_course == "linear" else 1)


@torch.inference_mode()
def sample(
    base: MaskedImageModel, conditions: Conditions, decoding: Decoding, acceleration: Acceleration
) -> Iterator[Step]:
    """Draw one image's tokens for each of ``conditions``, a :class:`Step` at a time.

    Each step computes features (by the base or by what stands in for it), draws codes at masked places from the guided
    logits, and commits those whose turn it is. All counts are fixed by the schedule, so nothing is read back from the
    device. An image depends on its seed and condition, not on its batch.

    Raises:
        ValueError: if the schedule cannot spend the tokens in so many steps, a condition does not fit the base, or a
            Halton order is asked for where there is no grid.
    """
    counts = tokens_per_step(decoding.schedule, decoding.num_steps, base.spec.num_tokens)
    context = base.context(conditions, guided=decoding.is_guided)
    feature_fn = acceleration.start(base, context, decoding.num_steps)
    seeds = conditions.seeds
    tokens = torch.full((len(seeds), base.spec.num_tokens), base.spec.mask_id, device=seeds.device)
    masked = _first_places(base.spec, decoding.order, seeds)
    committed = Control(tokens[:, :0], masked[:, :0])
    for index, count in enumerate(counts):
        share = torch.full(
            seeds.shape, masked.shape[1] / base.spec.num_tokens, dtype=torch.float32, device=seeds.device
        )
        state = State(index, tokens, committed, share)
        features, is_full = feature_fn(state)
        committed, masked = _choose(base, features, masked, seeds, decoding, index, count)
        tokens = tokens.scatter(1, committed.positions, committed.tokens)
        yield Step(state, features, is_full, committed, tokens)


def _first_places(spec: TokenSpec, order: Order, seeds: Tensor) -> Tensor:
    """All places (B, L): in the order they will be committed, or row by row where confidence decides."""
    if order == "confidence":
        return torch.arange(spec.num_tokens, device=seeds.device).expand(len(seeds), -1)
    places = halton_order(*spec.grid).to(seeds.device)
    return roll_order(places, seeds) if order == "halton_rolled" else places.expand(len(seeds), -1)


def _choose(
    base: MaskedImageModel,
    features: Tensor,
    masked: Tensor,
    seeds: Tensor,
    decoding: Decoding,
    index: int,
    count: int,
) -> tuple[Control, Tensor]:
    """``count`` of the places ``masked`` (B, M) with the codes drawn there, and the places left (B, M − count)."""
    if decoding.order != "confidence":  # whose turn it is was known before: the head runs there alone
        turn = masked[:, :count]
        return Control(_draw(base, features, turn, seeds, decoding, index).codes, turn), masked[:, count:]
    choice = _draw(base, features, masked, seeds, decoding, index)
    noise_scale = decoding.noise_at(index)
    ranked = confidence(choice.log_probs, uniforms_at(seeds, index, 1, masked), noise_scale).argsort(1, descending=True)
    chosen, left = ranked[:, :count], ranked[:, count:]
    return Control(choice.codes.gather(1, chosen), masked.gather(1, chosen)), masked.gather(1, left)


def _draw(
    base: MaskedImageModel, features: Tensor, places: Tensor, seeds: Tensor, decoding: Decoding, index: int
) -> Choice:
    """Codes at ``places`` (B, M) from the guided logits of ``features``."""
    logits = guide(base.interface.logits(features, places), decoding.guidance_at(index))
    if decoding.temperature == 0:
        return sample_codes(logits, None)
    return sample_codes(logits / decoding.temperature, uniforms_at(seeds, index, 0, places))


def generate(base: MaskedImageModel, conditions: Conditions, decoding: Decoding, acceleration: Acceleration) -> Tensor:
    """Codes (B, L) at the end of :func:`sample`; ``base.decode`` turns them into images."""
    for step in sample(base, conditions, decoding, acceleration):
        tokens = step.tokens
    return tokens
