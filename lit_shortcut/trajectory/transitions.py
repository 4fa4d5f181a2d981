"""Transitions: training windows and how they are batched."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_shortcut.contracts import Conditions, Control, Prefix, PrefixSize, Trajectories, Transition
from lit_shortcut.guidance import guide_rows
from lit_shortcut.trajectory.encoding import ENCODINGS, Parts


class EncodedTransition(NamedTuple):
    """A :class:`Transition` as it leaves the loader, encoded: ``features`` (B, G, 1 + R, S, …) before it, then targets.

    G is 1, for a window's own branch, unless ``guidance`` (B, 1 + R) gives the scales by which all branches are guided
    when they are decoded. ``others`` holds all the other fields. ``replaced``, of B, marks windows read in place
    of damaged ones.
    """

    encoding: str
    features: Parts
    others: Transition
    replaced: tuple[bool, ...]
    guidance: Tensor | None = None

    @classmethod
    def of(
        cls,
        encoding: str,
        features: Parts,
        tokens: Tensor,
        committed_at: Tensor,
        step: Tensor,
        gap: Tensor,
        prefix: Prefix | None,
        guidance: Sequence[float] | None = None,
    ) -> EncodedTransition:
        """Return windows from ``step`` (B,), the first target ``gap`` (B,) steps on, of ``tokens``, ``committed_at``.

        Those are (B, L), of whole trajectories. With ``guidance``, scales of the N steps, ``features`` are those of all
        branches, guided by the scales of the targets' steps; what a target is predicted from has the first one's.
        """
        window = next(iter(features.values())).shape[2] - 1
        before = step[:, None, None] + torch.arange(window, device=step.device)[:, None]
        after, committed_at = before + gap[:, None, None], committed_at[:, None]
        is_masked = committed_at >= after
        is_now = (committed_at >= before) & ~is_masked
        counts = is_now.sum(-1, keepdim=True)
        is_real = torch.arange(int(counts.max()), device=step.device) < counts
        positions = torch.zeros(is_real.shape, dtype=torch.long, device=step.device)
        positions[is_real] = is_now.nonzero()[:, -1]
        codes = tokens.long()[:, None].expand(-1, window, -1).gather(2, positions).where(is_real, 0)
        control = Control(codes, positions, None if bool(is_real.all()) else is_real)
        none = torch.empty(0)
        size = None if prefix is None else PrefixSize.of(prefix.lengths.tolist(), prefix.num_control.tolist())
        num_masked = tuple(is_masked.sum((0, 2)).tolist())
        others = Transition(none, control, none, is_masked, step, gap, prefix, size, num_masked)
        scales = None
        if guidance is not None:
            targets = (step + gap)[:, None] + torch.tensor([0, *range(window)], device=step.device)
            scales = torch.tensor(guidance, dtype=torch.float32, device=step.device)[targets]
        return cls(encoding, features, others, (False,) * len(step), scales)

    def decode(self) -> Transition:
        """Decode the features on the device they are on."""
        by_branch = ENCODINGS[self.encoding].decode(self.features).transpose(0, 1)
        if self.guidance is None:
            (features,) = by_branch
        else:
            # in bfloat16 the scale would be off by up to 0.4 %, and each guided value rounded once more
            by_branch = by_branch.to(torch.promote_types(by_branch.dtype, torch.float32))
            scale = self.guidance[..., None, None].to(by_branch, non_blocking=True)
            features = guide_rows(by_branch, scale, self.others.is_masked.shape[-1])
        return self.others._replace(features=features[:, 0], targets=features[:, 1:])


def select(
    trajectories: Trajectories,
    places: Sequence[tuple[int, int, int]],
    window: int = 1,
    gaps: Sequence[int] | None = None,
    guidance: Sequence[float] | None = None,
) -> Transition:
    """Return the windows of ``window`` (R) targets at ``places``: row, branch and the step before the window.

    ``gaps`` are the steps from there to the first target, 1 by default. With ``guidance``, scales of the N steps,
    features are guided, and all branches are 0. Features may be on another device than the other tensors, which are
    small and best kept on the CPU; so are windows.
    """
    row, branch, step = torch.tensor(places, device=trajectories.tokens.device).unbind(1)
    gap = torch.ones_like(step) if gaps is None else torch.tensor(gaps, device=step.device)
    targets = (step + gap)[:, None] + torch.arange(window, device=step.device)
    steps = torch.cat([step[:, None], targets], dim=1)
    features, prefix = trajectories.features, None
    if trajectories.prefix is not None:  # rows that are padding everywhere are left out before anything is copied
        frame = features.shape[-2] - trajectories.prefix.control.shape[-2]
        prefix = Prefix(*(part[row.to(part.device), branch.to(part.device)] for part in trajectories.prefix))
        prefix = prefix._replace(control=prefix.control[:, : int(prefix.num_control.max())])
        features = features[..., : frame + int(prefix.lengths.max()), :]
    branches = branch[:, None] if guidance is None else torch.arange(features.shape[1], device=step.device)
    at = torch.stack(torch.broadcast_tensors(row[:, None, None], branches[..., None], steps[:, None]))
    features = features[at.to(features.device, non_blocking=True).unbind()]  # indices on the CPU would each wait for it
    if prefix is not None:
        is_real = torch.arange(features.shape[-2], device=step.device) < frame + prefix.lengths.to(step.device)[:, None]
        is_real = is_real[:, None, None, :, None].to(features.device)
        features = features.where(is_real, 0)  # other padding is 0, as recorded
    tokens, committed_at = trajectories.tokens[row], trajectories.committed_at[row]
    encoding = str(features.dtype).removeprefix("torch.")
    return EncodedTransition.of(encoding, {"npy": features}, tokens, committed_at, step, gap, prefix, guidance).decode()


def concatenated(batches: Sequence[Trajectories]) -> Trajectories:
    """Concatenate ``batches``, with rows zero-padded to the longest."""
    if len(batches) == 1:
        return batches[0]
    ids, seeds, labels = (torch.cat(column) for column in zip(*(one.conditions[:3] for one in batches), strict=True))
    prompts = tuple(chain.from_iterable(one.conditions.prompts for one in batches))
    features, tokens, committed_at = zip(*(one[1:4] for one in batches), strict=True)
    prefixes = [one.prefix for one in batches if one.prefix is not None]
    prefix = Prefix(*map(_joined, zip(*prefixes, strict=True))) if prefixes else None
    conditions = Conditions(ids, seeds, labels, prompts)
    return Trajectories(conditions, _joined(features), torch.cat(tokens), torch.cat(committed_at), prefix)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate ``parts`` (B, …, S, C) or (B, G), with S zero-padded to the longest."""
    longest = max(part.shape[-2] for part in parts)
    return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[-2])) if part.ndim > 2 else part for part in parts])
