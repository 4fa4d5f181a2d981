"""Control tokens as a shortcut network takes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_shortcut.contracts import Context, Control, Prefix, PrefixSize
from lit_shortcut.interface import Places, TokenInterface
from lit_shortcut.networks.shortcut import VelocityNet
from lit_shortcut.weights import WeightsError


class EmbeddedControl(NamedTuple):
    """The network's arguments beside the features: embeddings (B, K, C), padding (B, K), and places."""

    tokens: Tensor
    is_real: Tensor | None
    places: Places


class Layout(NamedTuple):
    """What a prefix means for a batch at every step: where rows of the features stand, and the control it adds.

    ``rows`` (B, S) are places in the base's sequence, ``is_real`` (B, S) is false at rows that are padding. ``control``
    holds the prefix's tokens alone, P of them.
    """

    rows: Tensor
    is_real: Tensor | None
    control: EmbeddedControl


def lay_out(interface: TokenInterface, prefix: Prefix, num_rows: int, size: PrefixSize | None = None) -> Layout:
    """Lay out ``prefix`` (B, …) for features of ``num_rows`` (S), on the interface's device.

    Where nothing is padded no masks are made, since attention is faster without. ``size`` says whether that is so; when
    it is not given, a batch of one has no padding, and of others it is known where lengths lie on the CPU.
    """
    rows, row_is_real = interface.row_places(prefix.lengths, num_rows)
    assert interface.row_offsets is not None  # else it has no places
    num_control = prefix.control.shape[1]
    places = torch.arange(num_control, device=rows.device).expand(len(rows), -1)
    if size is None:
        rows_are_padded = _is_padded(prefix.lengths, num_rows - len(interface.row_offsets))
        control_is_padded = _is_padded(prefix.num_control, num_control)
    else:
        rows_are_padded = control_is_padded = size.is_padded
    is_real = places < prefix.num_control.to(rows.device)[:, None] if control_is_padded else None
    control = EmbeddedControl(prefix.control.to(rows.device), is_real, Places(rows=None, control=places))
    return Layout(rows, row_is_real if rows_are_padded else None, control)


def lay_out_branches(interface: TokenInterface, context: Context) -> list[Layout]:
    """Layouts of the guidance branches of a ``context`` with a prefix, each cut to the longest in its branch."""
    assert context.prefix is not None
    assert interface.row_offsets is not None
    layouts = []
    for branch, size in enumerate(context.prefix_sizes):
        lengths, control, num_control = (part[branch] for part in context.prefix)
        own = Prefix(lengths, control[:, : size.longest_control], num_control)
        layouts.append(lay_out(interface, own, len(interface.row_offsets) + size.longest, size))
    return layouts


def embed_control(interface: TokenInterface, control: Control, layout: Layout | None = None) -> EmbeddedControl:
    """Embed ``control`` (B, K), behind the tokens of the prefix that ``layout`` is of, if there is one."""
    committed = interface.embed(control.tokens, control.positions)
    if layout is None:
        return EmbeddedControl(committed, control.is_real, Places(rows=None, control=control.positions))
    prefix = layout.control
    return EmbeddedControl(
        tokens=torch.cat([prefix.tokens.to(committed.dtype), committed], dim=1),
        is_real=_joined(prefix, control),
        places=Places(
            rows=layout.rows,
            control=torch.cat([prefix.places.control, layout.rows.gather(1, control.positions)], dim=1),
            is_real=layout.is_real,
        ),
    )


def require_kind(network: VelocityNet, interface: TokenInterface, whose: str) -> None:
    """Refuse a ``network`` made for another kind of base than the one whose ``interface`` this is.

    Raises:
        WeightsError: naming the base, ``whose``, and what was expected.
    """
    has_places = interface.row_offsets is not None
    if network.uses_places != has_places:
        wanted, found = ("without", "with") if has_places else ("with", "without")
        raise WeightsError(
            f"{whose}: rows of its features stand {found} places in a sequence, but a {type(network).__name__} is made "
            f"for rows {wanted}; {'LLaDAShortcutNet' if has_places else 'ShortcutNet'} is for this base"
        )


def _joined(prefix: EmbeddedControl, control: Control) -> Tensor | None:
    """Which tokens of ``prefix``, then of ``control``, are no padding: (B, P + K), None where all are."""
    if prefix.is_real is None and control.is_real is None:
        return None
    parts = (prefix.places.control, prefix.is_real), (control.tokens, control.is_real)
    return torch.cat([torch.ones_like(of, dtype=torch.bool) if real is None else real for of, real in parts], dim=1)


def _is_padded(lengths: Tensor, longest: int) -> bool:
    """Whether one of ``lengths`` is below ``longest``; taken for granted where asking would wait for a device."""
    return len(lengths) > 1 and (lengths.device.type != "cpu" or bool((lengths < longest).any()))
