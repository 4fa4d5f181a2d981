"""Control tokens as input of a shortcut network."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_shortcut.contracts import Context, Control, Prefix, PrefixSize
from lit_shortcut.interface import Places, TokenInterface
from lit_shortcut.networks.rows import ALL_ROWS, Rows, RowsAt, RowsWhere
from lit_shortcut.networks.shortcut import ShortcutNetwork
from lit_shortcut.weights import WeightsError


class EmbeddedControl(NamedTuple):
    """A network's inputs beside the features: embeddings (B, K, C), a mask (B, K), false at padding, and places."""

    tokens: Tensor
    is_real: Tensor | None
    places: Places


class Layout(NamedTuple):
    """Places of the features' rows after a prefix, and the control tokens that the prefix adds at every step.

    ``rows`` (B, S, E) are places in the base's sequence, encoded by the network; ``is_real`` (B, S) is false at
    padding. ``control`` holds only the prefix's tokens, P of them.
    """

    rows: Tensor
    is_real: Tensor | None
    control: EmbeddedControl


def advance(
    network: ShortcutNetwork,
    interface: TokenInterface,
    features: Tensor,
    control: Control,
    masked_share: Tensor,
    layout: Layout | None = None,
    *,
    masked: Tensor | None = None,
    gap: Tensor | None = None,
) -> Tensor:
    """Predict features (B, S, C) by ``network`` from earlier ones, in training and sampling.

    Args:
        network: the shortcut.
        interface: interface of the base.
        features: (B, S, C), in the network's dtype.
        control: (B, K), tokens committed since.
        masked_share: (B,) r, before the predicted step.
        layout: layout of the samples' prefixes, if there are any.
        masked: places still masked, for a network that predicts only those: (B, M), or a mask (B, L) if their numbers
            differ between samples.
        gap: (B,) steps between ``features`` and the prediction, for an anchored network.
    """
    options = network.options
    embedded = embed_control(interface, control, layout)
    rows = ALL_ROWS
    if options.rows == "masked":
        assert masked is not None
        rows = _rows(interface, masked)
    tokens = embedded.tokens.to(features)
    predicted: Tensor = network(features, tokens, masked_share, embedded.is_real, embedded.places, rows, gap)
    return predicted


def lay_out(
    network: ShortcutNetwork,
    interface: TokenInterface,
    prefix: Prefix,
    num_rows: int,
    size: PrefixSize | None = None,
) -> Layout:
    """Lay out ``prefix`` (B, …) for features of ``num_rows`` (S), on the interface's device.

    If ``network`` does not use prefixes, this only gives the places of rows. Without padding no masks are made, since
    attention is faster without. ``size`` says whether there is padding; without it, a batch of one has none, and larger
    batches are checked if their lengths are on the CPU.
    """
    if not network.options.uses_prefix:
        prefix = prefix._replace(control=prefix.control[:, :0], num_control=torch.zeros_like(prefix.num_control))
    rows, row_is_real = interface.row_places(prefix.lengths, num_rows)
    assert interface.row_offsets is not None  # otherwise row_places raises
    num_control = prefix.control.shape[1]
    places = torch.arange(num_control, device=rows.device)[None]
    if size is None:
        rows_are_padded = _is_padded(prefix.lengths, num_rows - len(interface.row_offsets))
        control_is_padded = _is_padded(prefix.num_control, num_control)
    else:
        rows_are_padded = control_is_padded = size.is_padded
    is_real = places < prefix.num_control.to(rows.device)[:, None] if control_is_padded else None
    control_places = Places(rows=None, control=network.encode_places(places).expand(len(rows), -1, -1))
    control = EmbeddedControl(prefix.control.to(rows.device), is_real, control_places)
    return Layout(network.encode_places(rows), row_is_real if rows_are_padded else None, control)


def lay_out_branches(network: ShortcutNetwork, interface: TokenInterface, context: Context) -> list[Layout]:
    """Lay out the guidance branches of ``context``, each cut to the longest in its branch; [] without a prefix."""
    if (prefix := context.prefix) is None:
        return []
    assert interface.row_offsets is not None
    sizes = context.prefix_sizes or map(PrefixSize.of, prefix.lengths.tolist(), prefix.num_control.tolist())
    layouts = []
    for branch, size in enumerate(sizes):
        lengths, control, num_control = (part[branch] for part in prefix)
        own = Prefix(lengths, control[:, : size.longest_control], num_control)
        layouts.append(lay_out(network, interface, own, len(interface.row_offsets) + size.longest, size))
    return layouts


def embed_control(interface: TokenInterface, control: Control, layout: Layout | None = None) -> EmbeddedControl:
    """Embed ``control`` (B, K), after the tokens of the prefix in ``layout``, if there is one."""
    committed = interface.embed(control.tokens, control.positions)
    if layout is None:
        return EmbeddedControl(committed, control.is_real, Places(rows=None, control=control.positions))
    prefix = layout.control
    return EmbeddedControl(
        tokens=torch.cat([prefix.tokens.to(committed.dtype), committed], dim=1),
        is_real=_joined(prefix, control),
        places=Places(
            rows=layout.rows,
            control=torch.cat([prefix.places.control, RowsAt(control.positions).take(layout.rows)], dim=1),
            is_real=layout.is_real,
        ),
    )


def _rows(interface: TokenInterface, masked: Tensor) -> Rows:
    """Return the rows of ``masked`` tokens, (B, M) or a mask (B, L)."""
    if masked.dtype != torch.bool:
        if interface.num_rows == interface.num_tokens:
            return RowsAt(masked)
        is_masked = torch.zeros(len(masked), interface.num_tokens, dtype=torch.bool, device=masked.device)
        masked = is_masked.scatter(1, masked, True)
    return RowsWhere(interface.masked_rows(masked))


def require_kind(network: ShortcutNetwork, interface: TokenInterface, whose: str) -> None:
    """Check that ``network`` is made for bases with this kind of ``interface``.

    Raises:
        WeightsError: naming the base, ``whose``, and the class of networks for it.
    """
    has_places = interface.row_offsets is not None
    if network.uses_places != has_places:
        raise WeightsError(
            f"{whose}: its interface has {'' if has_places else 'no '}places of rows in a sequence; expected a "
            f"{'LLaDAShortcutNet' if has_places else 'ShortcutNet'}, found a {type(network).__name__}"
        )


def _joined(prefix: EmbeddedControl, control: Control) -> Tensor | None:
    """Return the mask (B, P + K), false at padding, of ``prefix``, then ``control``; None if there is no padding."""
    if prefix.is_real is None and control.is_real is None:
        return None
    parts = (prefix.places.control[..., 0], prefix.is_real), (control.tokens, control.is_real)
    return torch.cat([torch.ones_like(of, dtype=torch.bool) if real is None else real for of, real in parts], dim=1)


def _is_padded(lengths: Tensor, longest: int) -> bool:
    """Return whether a length is below ``longest``; True without looking where that would synchronise a device."""
    return len(lengths) > 1 and (lengths.device.type != "cpu" or bool((lengths < longest).any()))
