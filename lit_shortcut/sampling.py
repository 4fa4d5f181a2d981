"""The one decoding loop: vanilla, accelerated, recorded, previewed and timed generation all consume it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_shortcut.contracts import Acceleration, Conditions, Control, MaskedImageModel, State, Step
from lit_shortcut.decoding.schedules import Schedule, tokens_per_step
from lit_shortcut.decoding.unmasking import confidence, guide, sample_codes, uniforms_at


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn. The defaults are those of MaskGIT at 512×512 (arXiv 2310.14400).

    Args:
        num_steps: N, steps of the decoding loop.
        schedule: shape of the number of tokens each step commits.
        guidance: classifier-free guidance at the last step, rising linearly from 0; 0 runs one branch alone.
        temperature: logits are multiplied by its inverse before codes are drawn; 0 takes the most probable code.
        confidence_noise: scale of the Gumbel noise on confidences at step 0, falling linearly to 0.
    """

    num_steps: int = 15
    schedule: Schedule = "arccos"
    guidance: float = 2.8
    temperature: float = 1.0
    confidence_noise: float = 7.0

    def __post_init__(self) -> None:
        for name in ("temperature", "confidence_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def at(self, num_steps: int) -> Decoding:
        """The same in ``num_steps`` steps."""
        return replace(self, num_steps=num_steps)

    def progress(self, step: int) -> float:
        """0 at the first step, 1 at the last; 0 where there is one step alone."""
        return step / max(1, self.num_steps - 1)


@torch.inference_mode()
def sample(
    base: MaskedImageModel, conditions: Conditions, decoding: Decoding, acceleration: Acceleration
) -> Iterator[Step]:
    """Draw one image's tokens for each of ``conditions``, a :class:`Step` at a time.

    Each step computes features (by the base or by what stands in for it), draws a code at every masked place from the
    guided logits, and commits the most confident of them. All counts are fixed by the schedule, so nothing is read
    back from the device. An image depends on its seed and condition, not on its batch.

    Raises:
        ValueError: if the schedule cannot spend the tokens in so many steps, or a condition does not fit the base.
    """
    counts = tokens_per_step(decoding.schedule, decoding.num_steps, base.spec.num_tokens)
    context = base.context(conditions, guided=decoding.guidance != 0)
    feature_fn = acceleration.start(base, context, decoding.num_steps)
    seeds = conditions.seeds
    tokens = torch.full((len(seeds), base.spec.num_tokens), base.spec.mask_id, device=seeds.device)
    masked = torch.arange(base.spec.num_tokens, device=seeds.device).expand_as(tokens)
    committed = Control(tokens[:, :0], masked[:, :0])
    for index, count in enumerate(counts):
        share = torch.full(seeds.shape, masked.shape[1] / base.spec.num_tokens, device=seeds.device)
        state = State(index, tokens, committed, share)
        features, is_full = feature_fn(state)
        committed, masked = _choose(base, features, masked, seeds, decoding, index, count)
        tokens = tokens.scatter(1, committed.positions, committed.tokens)
        yield Step(state, features, is_full, committed, tokens)


def _choose(
    base: MaskedImageModel,
    features: Tensor,
    masked: Tensor,
    seeds: Tensor,
    decoding: Decoding,
    index: int,
    count: int,
) -> tuple[Control, Tensor]:
    """The ``count`` most confident codes of the places ``masked`` (B, M), and the places left (B, M − count)."""
    progress = decoding.progress(index)
    logits = guide(base.interface.logits(features, masked), decoding.guidance * progress)
    if decoding.temperature == 0:
        choice = sample_codes(logits, None)
    else:
        choice = sample_codes(logits / decoding.temperature, uniforms_at(seeds, index, 0, masked))
    noise_scale = decoding.confidence_noise * (1 - progress)
    order = confidence(choice.log_probs, uniforms_at(seeds, index, 1, masked), noise_scale).argsort(1, descending=True)
    chosen, left = order[:, :count], order[:, count:]
    return Control(choice.codes.gather(1, chosen), masked.gather(1, chosen)), masked.gather(1, left)


def generate(base: MaskedImageModel, conditions: Conditions, decoding: Decoding, acceleration: Acceleration) -> Tensor:
    """Codes (B, L) at the end of :func:`sample`; ``base.decode`` turns them into images."""
    for step in sample(base, conditions, decoding, acceleration):
        tokens = step.tokens
    return tokens
