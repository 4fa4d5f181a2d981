"""The only decoding loop, for vanilla, accelerated, recorded, previewed and timed generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from math import inf, prod
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import (
    Acceleration,
    Clock,
    Conditions,
    Context,
    Control,
    MaskedImageModel,
    State,
    Step,
    TokenSpec,
)
from lit_shortcut.decoding.halton import halton_order, roll_order, rolled_starts
from lit_shortcut.decoding.noise import bfloat16_gumbel, gumbel, uniform, uniform_by_code
from lit_shortcut.decoding.schedules import Schedule, tokens_per_step
from lit_shortcut.decoding.temperature import TemperatureCourse
from lit_shortcut.decoding.unmasking import Choice, largest_codes, sample_codes
from lit_shortcut.guidance import guide

Order = Literal["confidence", "halton", "halton_rolled"]
Course = Literal["linear", "constant"]
NoiseCourse = Literal["linear", "constant", "product"]
NoiseDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn. The defaults are those of MaskGIT at 512×512 (arXiv 2310.14400).

    Args:
        num_steps: N, steps of the decoding loop.
        schedule: shape of the number of tokens each step commits.
        guidance: classifier-free guidance at the last step; 0 runs the conditional branch only.
        guidance_course: whether guidance rises linearly from 0, or is constant.
        temperature: logits are multiplied by its inverse before codes are drawn; 0 takes the most probable code.
        temperature_course: factors of the logits beside ``temperature``, step by step.
        confidence_noise: scale of the Gumbel noise on confidences at step 0.
        noise_course: whether that scale falls linearly to 0, is constant, or is multiplied by 1 − (i+1)/N at each step
            i (``product``, as MMaDA and Show-o do).
        noise_dtype: ``float32`` draws codes exactly. ``bfloat16`` draws them by Gumbel noise as Lumina-DiMOO's release
            does: rounded noise never exceeds 5.6, so that improbable codes are never drawn, and confidences vary less.
        order: which places are committed first: the most confident; or those of a fixed order of low discrepancy over
            the grid (:func:`~lit_shortcut.decoding.halton.halton_order`), the same for all images or, rolled, begun at
            a place of each image's own. Those two orders use neither confidence nor its noise.
    """

    num_steps: int = 15
    schedule: Schedule = "arccos"
    guidance: float = 2.8
    guidance_course: Course = "linear"
    temperature: float = 1.0
    temperature_course: TemperatureCourse = field(default_factory=TemperatureCourse)
    confidence_noise: float = 7.0
    noise_course: NoiseCourse = "linear"
    noise_dtype: NoiseDtype = "float32"
    order: Order = "confidence"

    def __post_init__(self) -> None:
        require_at_least(1, num_steps=self.num_steps)
        require_at_least(0, temperature=self.temperature, confidence_noise=self.confidence_noise)
        words: dict[str, Any] = {"schedule": Schedule, "guidance_course": Course, "order": Order}
        words |= {"noise_course": NoiseCourse, "noise_dtype": NoiseDtype}
        for name, kind in words.items():
            if getattr(self, name) not in (known := get_args(kind)):
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Decoding:
        """Return the decoding that :func:`dataclasses.asdict` took apart, as cards and configurations hold it.

        Raises:
            ValueError: if a field is unknown, of another kind, or has no such value; the message names it.
        """
        return cls().replaced(values)

    def replaced(self, values: Mapping[str, Any]) -> Decoding:
        """Return the decoding with fields of other ``values``, as JSON and YAML hold them; courses are merged.

        Raises:
            ValueError: as :meth:`from_values`.
        """
        changes: dict[str, Any] = {}
        for name, value in values.items():
            if name not in (known := [field.name for field in fields(self)]):
                raise ValueError(f"{name} is no field of a decoding; known are {', '.join(known)}")
            current = getattr(self, name)
            if isinstance(current, TemperatureCourse):
                kind, is_one = "a mapping of its fields", isinstance(value, Mapping)
            elif isinstance(current, str):
                kind, is_one = "a word", isinstance(value, str)
            elif isinstance(current, int):
                kind, is_one = "a whole number", type(value) is int
            else:
                kind, is_one = "a number", type(value) in (int, float)
            if not is_one:
                raise ValueError(f"{name} must be {kind}, got {value!r}")
            try:
                changes[name] = replace(current, **value) if isinstance(value, Mapping) else value
            except TypeError as error:
                raise ValueError(f"{name}: {error}") from error
        return replace(self, **changes)

    @property
    def is_guided(self) -> bool:
        """True if there is guidance at any step."""
        return self.guidance != 0

    @property
    def branches(self) -> int:
        """Return G, the branches of a pass: 2 with guidance, else 1."""
        return 2 if self.is_guided else 1

    def at(self, num_steps: int) -> Decoding:
        """Return the same decoding in ``num_steps`` steps."""
        return replace(self, num_steps=num_steps)

    def progress(self, step: int) -> float:
        """Return the progress at ``step``: 0 at the first step, 1 at the last; 0 for a single step."""
        return step / max(1, self.num_steps - 1)

    def guidance_at(self, step: int) -> float:
        """Return the scale of the guidance at ``step``."""
        return self.guidance * (self.progress(step) if self.guidance_course == "linear" else 1)

    @property
    def guidance_by_step(self) -> list[float]:
        """Return the scale of the guidance at each of the N steps."""
        return [self.guidance_at(step) for step in range(self.num_steps)]

    def sharpness_at(self, step: int) -> float:
        """Return the factor of the logits at ``step`` before codes are drawn; infinite at temperature 0."""
        return self.temperature_course.at(step, self.num_steps) / self.temperature if self.temperature else inf

    def noise_at(self, step: int) -> float:
        """Return the scale of the noise on confidences at ``step``."""
        match self.noise_course:
            case "linear":
                return self.confidence_noise * (1 - self.progress(step))
            case "product":
                return self.confidence_noise * prod(1 - (i + 1) / self.num_steps for i in range(step + 1))
            case _:
                return self.confidence_noise


@torch.inference_mode()
def sample(
    base: MaskedImageModel,
    conditions: Conditions,
    decoding: Decoding,
    acceleration: Acceleration,
    context: Context | None = None,
) -> Iterator[Step]:
    """Draw one image's tokens for each of ``conditions``, a :class:`Step` at a time.

    Each step computes features (by the base or by what stands in for it), draws codes at masked places from the guided
    logits, and commits some of them. All counts are fixed by the schedule and all noise is drawn before the first step,
    so the loop itself reads nothing back from the device. An image depends on its seed and condition, not on its batch.

    Args:
        base: the frozen model.
        conditions: what to generate, in one batch.
        decoding: how tokens are drawn.
        acceleration: computes the features of each step.
        context: context of ``conditions``, if the caller has it already.

    Raises:
        ValueError: if the schedule cannot spend the tokens in so many steps, a condition does not fit the base, or a
            Halton order is asked for where there is no grid.
    """
    num_tokens = base.spec.num_tokens
    counts = tokens_per_step(decoding.schedule, decoding.num_steps, num_tokens)
    if context is None:
        context = base.context(conditions, guided=decoding.is_guided)
    feature_fn = acceleration.start(base, context, counts)
    seeds = conditions.seeds
    noise = _noise_of_all_steps(seeds, decoding, num_tokens)
    masked = _first_places(base.spec, decoding.order, seeds)
    shares = _masked_shares(counts, seeds)
    tokens = torch.full_like(masked, base.spec.mask_id)
    committed = Control(tokens[:, :0], masked[:, :0])
    for index, count in enumerate(counts):
        clock, guidance = Clock(index, decoding.num_steps), decoding.guidance_at(index)
        state = State(clock, tokens, committed, shares[index], masked, guidance)
        features, is_full = feature_fn(state)
        committed, log_probs, masked = _choose(base, features, state, decoding, noise, count)
        tokens = tokens.scatter(1, committed.positions, committed.tokens)
        yield Step(state, features, is_full, committed, tokens, log_probs)


class Generated(NamedTuple):
    """Codes ``tokens`` (B, L) at the end of :func:`sample`, and how often the base ran for each sample (B,)."""

    tokens: Tensor
    full_steps: Tensor


def generate(
    base: MaskedImageModel,
    conditions: Conditions,
    decoding: Decoding,
    acceleration: Acceleration,
    *,
    on_step: Callable[[Step], None] | None = None,
) -> Generated:
    """Run :func:`sample` to its end; ``base.decode`` turns the tokens into images.

    ``on_step`` is called after each step: for progress, or to gather :class:`LogProbs`.
    """
    full_steps = torch.zeros_like(conditions.seeds)
    for step in sample(base, conditions, decoding, acceleration):
        tokens = step.tokens
        full_steps = full_steps + step.is_full
        if on_step is not None:
            on_step(step)
    return Generated(tokens, full_steps)


class LogProbs:
    """Log-probabilities of all tokens of a run, under the policy that drew them; call it with each :class:`Step`."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []

    def __call__(self, step: Step) -> None:
        """Add the tokens committed by ``step``."""
        self._parts.append((step.committed.positions, step.log_probs))

    def gathered(self) -> Tensor:
        """Return them by place, float32 (B, L); see :class:`Step` for their definition."""
        positions, values = (torch.cat(parts, dim=1) for parts in zip(*self._parts, strict=True))
        return torch.empty_like(values).scatter_(1, positions, values)


class _Noise(NamedTuple):
    """Noise of all steps, each (N, B, L) or None: uniform for codes, Gumbel on confidences; and ``seeds`` (B,)."""

    codes: Tensor | None
    confidences: Tensor | None
    seeds: Tensor


def _noise_of_all_steps(seeds: Tensor, decoding: Decoding, num_tokens: int) -> _Noise:
    steps, places = (torch.arange(count, device=seeds.device) for count in (decoding.num_steps, num_tokens))
    codes = uniform(seeds, 2 * steps, places) if decoding.temperature else None
    scales = [decoding.noise_at(step) for step in range(decoding.num_steps)]
    if decoding.order != "confidence" or not any(scales):
        return _Noise(codes, None, seeds)
    scale = torch.tensor(scales, dtype=torch.float32).to(seeds.device, non_blocking=True)[:, None, None]
    uniforms = uniform(seeds, 2 * steps + 1, places)
    of_confidences = bfloat16_gumbel(uniforms).float() if decoding.noise_dtype == "bfloat16" else gumbel(uniforms)
    return _Noise(codes, of_confidences * scale, seeds)


def _masked_shares(counts: list[int], seeds: Tensor) -> Tensor:
    """Return the share of tokens masked before each step, the same for all samples: (N, B)."""
    total = sum(counts)
    shares = [(total - known) / total for known in accumulate([0, *counts[:-1]])]
    on_device = torch.tensor(shares, dtype=torch.float32).to(seeds.device, non_blocking=True)
    return on_device[:, None].expand(-1, len(seeds))


def _first_places(spec: TokenSpec, order: Order, seeds: Tensor) -> Tensor:
    """Return all places (B, L) in the order of their commitment, or row by row if confidence decides."""
    if order == "confidence":
        return torch.arange(spec.num_tokens, device=seeds.device).expand(len(seeds), -1)
    places = halton_order(*spec.grid).to(seeds.device, non_blocking=True)
    if order == "halton":
        return places.expand(len(seeds), -1)
    return roll_order(places, rolled_starts(seeds, len(places)))


def _choose(
    base: MaskedImageModel,
    features: Tensor,
    state: State,
    decoding: Decoding,
    noise: _Noise,
    count: int,
) -> tuple[Control, Tensor, Tensor]:
    """Commit ``count`` of the places still masked: codes and places, their log-probabilities, the places left."""
    masked = state.masked
    if decoding.order != "confidence":  # the next places are known: the head runs only there
        turn = masked[:, :count]
        choice = _draw(base, features, turn, state, decoding, noise)
        return Control(choice.codes, turn), choice.log_probs, masked[:, count:]
    choice = _draw(base, features, masked, state, decoding, noise)
    confidence = choice.log_probs
    if noise.confidences is not None:  # log p + scale · Gumbel (arXiv 2202.04200, section 3.2)
        confidence = confidence + noise.confidences[state.clock.step].gather(1, masked)
    ranked = confidence.argsort(dim=1, descending=True, stable=True)
    chosen, left = ranked[:, :count], ranked[:, count:]
    committed = Control(choice.codes.gather(1, chosen), masked.gather(1, chosen))
    return committed, choice.log_probs.gather(1, chosen), masked.gather(1, left)


def _draw(
    base: MaskedImageModel, features: Tensor, places: Tensor, state: State, decoding: Decoding, noise: _Noise
) -> Choice:
    """Draw codes at ``places`` (B, M) from the guided logits of ``features``.

    A linear head runs once, on guided features: their logits are the guided logits, and rounding is not magnified.
    """
    interface, scale, step = base.interface, state.guidance, state.clock.step
    if interface.is_linear:
        logits = interface.row_logits(guide(interface.rows_at(features, places), scale), places)
    else:
        logits = guide(interface.logits(features, places), scale)
    if noise.codes is None:
        return sample_codes(logits, None)
    if (sharpness := decoding.sharpness_at(step)) != 1:
        logits = logits * sharpness
    if decoding.noise_dtype == "bfloat16":  # a value for each code: too many to make before the first step
        uniforms = uniform_by_code(noise.seeds, 2 * step, places, logits.shape[-1])
        return largest_codes(logits, bfloat16_gumbel(uniforms))
    return sample_codes(logits, noise.codes[step].gather(1, places))
