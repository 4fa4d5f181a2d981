"""Replay of accelerations along recorded tokens, with a recorded batch in place of the base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lit_shortcut.contracts import (
    Acceleration,
    BaseEnds,
    Clock,
    Context,
    Control,
    Prefix,
    PrefixSize,
    State,
    TokenSpec,
    Trajectories,
)
from lit_shortcut.guidance import guide
from lit_shortcut.interface import TokenInterface
from lit_shortcut.metrics.functional import head_kl


@dataclass(frozen=True, kw_only=True)
class ReplayContext(Context):
    """Context of recorded samples.

    Args:
        samples: their rows in the recorded batch, (G, B).
    """

    samples: Tensor


@dataclass(eq=False)
class RecordedEnds:
    """Properties of a base that its recorded set knows."""

    spec: TokenSpec
    interface: TokenInterface
    fingerprint: str


class Replay:
    """A base that returns the features of a recorded batch.

    Only one step at a time is moved to the interface's device, in float32 at least; trajectories stay in the host's
    memory.

    Args:
        ends: properties of the base that recorded the batch.
        trajectories: the recorded batch; all samples commit equally many tokens at a step.
        guidance: guidance scale at each of the N steps.
    """

    def __init__(self, ends: BaseEnds, trajectories: Trajectories, guidance: Sequence[float]) -> None:
        self.guidance = guidance
        self.spec, self.interface, self.fingerprint = ends.spec, ends.interface, ends.fingerprint
        num_steps = trajectories.features.shape[2]
        committed = Counter(trajectories.committed_at.tolist()[0])
        self.counts = [committed[step] for step in range(num_steps)]
        self._features = trajectories.features
        device = self.interface.code_embedding.device
        self._tokens, self._committed_at = (
            part.to(device).long() for part in (trajectories.tokens, trajectories.committed_at)
        )
        self._order = self._committed_at.argsort(dim=1, stable=True)  # places as they were committed
        self._loaded: tuple[int, Tensor] | None = None
        batch, branches = self._features.shape[:2]
        prefix = trajectories.prefix
        self.recorded = ReplayContext(
            prefix=prefix and prefix.map(lambda part: part.transpose(0, 1)),  # (B, G, …) to (G, B, …)
            prefix_sizes=() if prefix is None else _sizes(prefix),
            samples=torch.arange(batch, device=device).expand(branches, -1),
        )

    def features(self, tokens: Tensor, context: Context, clock: Clock) -> Tensor:
        """Features (G, B, S, C) recorded at this step, for any ``tokens``."""
        assert isinstance(context, ReplayContext)
        if self._loaded is None or self._loaded[0] != clock.step:
            device, step = self._tokens.device, self._features[:, :, clock.step].transpose(0, 1)
            dtype = torch.promote_types(step.dtype, torch.float32)
            self._loaded = clock.step, step.to(device, non_blocking=True).to(dtype)
        loaded = self._loaded[1]
        return loaded if context is self.recorded else loaded[:, context.samples[0]]

    def states(self, first: int = 0) -> Iterator[State]:
        """States of the recorded run from step ``first`` on, with the tokens that were committed then."""
        num_steps, batch = len(self.counts), len(self._tokens)
        for step in range(first, num_steps):
            known = sum(self.counts[:step])
            masked = self._order[:, known:]
            tokens = self._tokens.scatter(1, masked, self.spec.mask_id)
            share = masked.shape[1] / self.spec.num_tokens
            yield State(
                Clock(step, num_steps),
                tokens,
                self.committed(step - 1) if step else Control(tokens[:, :0], masked[:, :0]),
                torch.full((batch,), share, dtype=torch.float32, device=tokens.device),
                masked,
                self.guidance[step],
            )

    def steps(self) -> Iterator[tuple[State, Tensor]]:
        """Each state of the recorded run with the recorded features (G, B, S, C)."""
        for state in self.states():
            yield state, self.features(state.tokens, self.recorded, state.clock)

    def committed(self, step: int) -> Control:
        """Tokens (B, K) committed by ``step``."""
        known = sum(self.counts[:step])
        places = self._order[:, known : known + self.counts[step]]
        return Control(self._tokens.gather(1, places), places)


def _sizes(prefix: Prefix) -> tuple[PrefixSize, ...]:
    """Return the sizes of ``prefix`` (B, G, …) on the host, one for each branch."""
    lengths, num_control = (zip(*part.tolist(), strict=True) for part in (prefix.lengths, prefix.num_control))
    return tuple(map(PrefixSize.of, lengths, num_control))


class Replayed(NamedTuple):
    """Cost of one method per sample: ``kl`` (B,) in nats, and ``full_steps`` (B,)."""

    kl: Tensor
    full_steps: Tensor


def replayed(replay: Replay, methods: Mapping[str, Acceleration], *, with_kl: bool = True) -> dict[str, Replayed]:
    """Replay ``methods`` side by side and sum over all steps the KL at the places each step committed.

    Args:
        replay: the recorded batch.
        methods: accelerations by name.
        with_kl: false only counts full steps; the KL is then 0.
    """
    runs = {name: method.start(replay, replay.recorded, replay.counts) for name, method in methods.items()}
    samples = replay.recorded.samples[0]
    nothing = torch.zeros_like(samples, dtype=torch.float32)
    totals = {name: Replayed(nothing, nothing) for name in methods}
    for state, truth in replay.steps():
        for name, run in runs.items():
            kl, full_steps = totals[name]
            features, is_full = run(state)
            if with_kl and is_full is not True:
                kl = kl + committed_kl(replay, truth, features, state.clock.step)
            totals[name] = Replayed(kl, full_steps + is_full)
    return totals


def committed_kl(replay: Replay, truth: Tensor, guess: Tensor, step: int) -> Tensor:
    """Return the KL (B,), in nats, of the guided head on ``guess`` from that on ``truth`` where ``step`` commits."""
    places = replay.committed(step).positions
    wanted, found = (guide(replay.interface.logits(part, places), replay.guidance[step]) for part in (truth, guess))
    return head_kl(wanted, found).sum(-1)
