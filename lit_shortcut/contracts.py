"""Read first: the protocols at the seams, the tuples that cross them, and the letters for shapes.

Letters, the same in every docstring: B batch, G guidance branches (conditional first; 1 without guidance, else 2),
L image tokens, S sequence length the base sees (S ≥ L), M tokens still masked, K tokens committed in one step,
C feature width, V codebook, N steps, b budget (full steps among them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from math import isqrt
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

from torch import Tensor
from torch.utils.data import DataLoader

from lit_shortcut.interface import TokenInterface


class Conditions(NamedTuple):
    """What to generate, one row per sample.

    ``ids`` (B,) number the samples of a run, ``seeds`` (B,) int64 determine all their noise, ``labels`` (B,) are
    classes, or indices of the ``prompts`` in their list. ``prompts`` are B texts; empty for classes.
    """

    ids: Tensor
    seeds: Tensor
    labels: Tensor
    prompts: tuple[str, ...] = ()

    def slice(self, start: int, stop: int) -> Conditions:
        """Return the conditions of samples ``start`` to ``stop`` − 1."""
        chosen = slice(start, stop)
        return Conditions(self.ids[chosen], self.seeds[chosen], self.labels[chosen], self.prompts[chosen])


def require_prompts(conditions: Conditions) -> tuple[str, ...]:
    """Return the prompts of ``conditions``; raises ValueError if there is not one per sample, or one is empty."""
    if len(conditions.prompts) != len(conditions.ids):
        raise ValueError(
            f"expected a prompt for each of {len(conditions.ids)} samples, got {len(conditions.prompts)}; "
            "datamodules.prompts.Prompts makes such conditions"
        )
    if empty := [index for index, prompt in enumerate(conditions.prompts) if not prompt.strip()]:
        raise ValueError(f"expected a prompt, got an empty one for sample {int(conditions.ids[empty[0]])}")
    return conditions.prompts


class Prefix(NamedTuple):
    """A text prefix as a shortcut network sees it: it offsets all places, and its tokens are extra control tokens.

    Leading dimensions: (G, B) in a :class:`Context`, (B, G) in :class:`Trajectories`, (B,) in a :class:`Transition`.
    ``lengths`` (…) count the prefix's tokens. ``control`` (…, P, C) are the base's embeddings of those that are control
    at every step; the first ``num_control`` (…) are valid (all of them in the conditional branch, none in the
    unconditional). As many rows of the features, P, belong to the prefix.
    """

    lengths: Tensor
    control: Tensor
    num_control: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Prefix:
        """Apply ``function``, which treats leading dimensions only, to all three tensors."""
        return Prefix(*(function(part) for part in self))


class PrefixSize(NamedTuple):
    """Plain numbers for the shapes of a batch's prefixes, so that neither shapes nor masks wait for a device.

    ``longest`` and ``longest_control`` bound ``lengths`` and ``num_control``; without ``is_padded`` all reach them.
    """

    longest: int
    longest_control: int
    is_padded: bool

    @classmethod
    def of(cls, lengths: Sequence[int], num_control: Sequence[int]) -> PrefixSize:
        """Return the size of prefixes, from the numbers of each sample."""
        is_padded = min(lengths) < max(lengths) or min(num_control) < max(num_control)
        return cls(max(lengths), max(num_control), is_padded)


@dataclass(frozen=True, kw_only=True)
class Context:
    """A base's own form of the conditions, computed once per batch. Only the base looks inside.

    A base adds fields of its own in a subclass: token ids, encoder states, masks, plain numbers for shapes. Fields that
    are tensors lead with (G, B); tuples hold one entry per guidance branch; everything else is shared by all.

    Args:
        prefix: the text prefix, for a base whose features include its rows; other bases leave it out, with or without
            prompts.
        prefix_sizes: sizes of the prefix, one for each guidance branch; read from its tensors if left out.
    """

    prefix: Prefix | None = None
    prefix_sizes: tuple[PrefixSize, ...] = ()

    def rows(self, index: Tensor) -> Self:
        """Return the context of the samples at ``index`` (n,)."""
        changes: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = value[:, index.to(value.device)]
            elif isinstance(value, Prefix):
                changes[field.name] = value.map(lambda tensor: tensor[:, index.to(tensor.device)])
        return replace(self, **changes)


class Clock(NamedTuple):
    """Position in the decoding loop: ``step``, 0 … N − 1, of ``num_steps`` (N)."""

    step: int
    num_steps: int


class TokenSpec(NamedTuple):
    """A base's sizes and special ids; they live here once.

    ``sequence_length`` is S, with the longest prompt where prompts differ; ``num_classes`` is 0 for a base that takes
    prompts; ``grid_height`` is 0 where the token grid is a square.
    """

    num_tokens: int
    sequence_length: int
    width: int
    codebook_size: int
    mask_id: int
    num_classes: int
    grid_height: int = 0

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the token grid.

        Raises:
            ValueError: if ``num_tokens`` fill no such grid.
        """
        height = self.grid_height or isqrt(self.num_tokens)
        width, left = divmod(self.num_tokens, height)
        if left or (not self.grid_height and width != height):
            shape = f"a token grid of {height} rows" if self.grid_height else "a square token grid"
            raise ValueError(f"{shape} is needed, and num_tokens is {self.num_tokens}")
        return height, width


class Control(NamedTuple):
    """Tokens just committed, the control of the next step's features (arXiv 2602.23996, section 3).

    ``tokens`` and ``positions`` (B, K) are codes and image places; ``is_real`` (B, K) is false at padding, None if
    there is no padding. In a :class:`Transition` all three have a further dimension, (B, R, K).
    """

    tokens: Tensor
    positions: Tensor
    is_real: Tensor | None = None


class State(NamedTuple):
    """State of the decoding loop at a step, before its features are computed.

    ``tokens`` (B, L) hold codes and the mask id; ``control`` is what the previous step committed (K = 0 at step 0);
    ``masked_share`` (B,) is the share of image tokens still masked, r in the paper; ``masked`` (B, M) are their places,
    in no particular order; ``guidance`` is the scale of the guidance, w.
    """

    clock: Clock
    tokens: Tensor
    control: Control
    masked_share: Tensor
    masked: Tensor
    guidance: float = 0.0


class Step(NamedTuple):
    """Result of one step of the decoding loop.

    ``features`` (G, B, S, C) belong to ``state``; ``is_full`` says whether the base computed them, for the whole batch
    or, depending on the plan, sample by sample (B,). ``committed`` are the tokens committed by this step and ``tokens``
    (B, L) the grid after it. ``log_probs`` (B, K), float32, are log-probabilities of the committed codes under the
    distribution they were drawn from: guided, at the decoding's temperature (1 if that is 0, since nothing is drawn).
    They do not include the choice of places.
    """

    state: State
    features: Tensor
    is_full: bool | Tensor
    committed: Control
    tokens: Tensor
    log_probs: Tensor


class Trajectories(NamedTuple):
    """Recorded runs of the decoding loop: all features of all steps.

    ``features`` (B, G, N, S, C); ``tokens`` (B, L), the final codes; ``committed_at`` (B, L), the step that committed
    each. ``prefix`` is the context's; if prefixes differ in length, rows after a shorter one are padding.
    """

    conditions: Conditions
    features: Tensor
    tokens: Tensor
    committed_at: Tensor
    prefix: Prefix | None = None


class Transition(NamedTuple):
    """A training window with R consecutive steps as targets, guidance branches apart, samples mixed.

    ``features`` (B, S, C) of ``step`` (B,), the first target ``gap`` (B,) steps on; for each target ``control``
    (B, R, K), the tokens committed since ``gap`` steps before, padded to the longest, and ``is_masked`` (B, R, L),
    places still masked. ``num_masked`` counts those of each target, if known.
    """

    features: Tensor
    control: Control
    targets: Tensor
    is_masked: Tensor
    step: Tensor
    gap: Tensor
    prefix: Prefix | None = None
    prefix_size: PrefixSize | None = None
    num_masked: tuple[int, ...] = ()

    @property
    def masked_share(self) -> Tensor:
        """Share of image tokens still masked, r in the paper: (B, R), float32 in every precision."""
        return self.is_masked.float().mean(-1)


class BaseEnds(Protocol):
    """Properties of a base that are known without running it; recorded sets have them, too."""

    spec: TokenSpec
    interface: TokenInterface

    @property
    def fingerprint(self) -> str:
        """Hash of the weights, equal only for equal weights; ties shards and shortcuts to their base."""


class ImageDecoder(Protocol):
    """Decoder from codes to images."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Images, uint8 (B, 3, H, W), of codes ``tokens`` (B, L)."""


class FeatureModel(BaseEnds, Protocol):
    """What an acceleration runs or replaces: the expensive pass of a base, or what was recorded of it."""

    def features(self, tokens: Tensor, context: Context, clock: Clock) -> Tensor:
        """Features (G, B, S, C) of ``tokens`` (B, L): the expensive pass. Most bases ignore ``clock``."""


class MaskedImageModel(FeatureModel, ImageDecoder, Protocol):
    """A frozen base: heavy ``features``, cheap ends in ``interface``.

    The first rows of its features are the image's, row by row: one for each token, or for a square of tokens, as
    ``interface`` says. All other rows are the base's own; ``interface`` knows places in its sequence if they matter.
    """

    def identity(self) -> dict[str, Any]:
        """JSON values of everything the images depend on: weights, image decoder, prompt template and the like."""

    def context(self, conditions: Conditions, *, guided: bool) -> Context:
        """Compute once per batch what ``features`` needs, with the unconditional branch if ``guided``."""


@runtime_checkable
class ChecksConditions(Protocol):
    """A base whose contexts are expensive, and that can check conditions without one, before a run."""

    def require_known(self, conditions: Conditions) -> None:
        """Raise the ValueError that ``context`` would raise, if it would."""


FeatureFn = Callable[[State], tuple[Tensor, bool | Tensor]]
"""Maps a state to features and to whether the base computed them, as in :class:`Step`; its closure holds memory."""


class Acceleration(Protocol):
    """Decides what computes the features of each step. Not "accelerator": Lightning means hardware by that."""

    def identity(self) -> dict[str, Any]:
        """JSON values that determine the computed features: method, plan, weights."""

    def start(self, base: FeatureModel, context: Context, counts: Sequence[int]) -> FeatureFn:
        """Return a feature function for one batch; nothing outlives it.

        ``counts`` are the tokens committed at each of the N steps.
        """


class ConditionSource(Protocol):
    """A source of conditions, batch by batch."""

    def loader(self, seed: int | None = None) -> DataLoader[Conditions]:
        """Batches of conditions under run seed ``seed``; None takes the source's own."""
