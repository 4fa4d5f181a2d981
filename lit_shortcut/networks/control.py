"""Control tokens as input of a shortcut network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_shortcut.contracts import BaseEnds, Context, Control, Prefix, PrefixSize, Transition
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
        rows = _rows(interface, masked, features.shape[-2])
    tokens = embedded.tokens.to(features)
    predicted: Tensor = network(features, tokens, masked_share, embedded.is_real, embedded.places, rows, gap)
    return predicted


def lay_out(network: ShortcutNetwork, interface: TokenInterface, prefix: Prefix, size: PrefixSize) -> Layout:
    """Lay out ``prefix`` (B, …) of ``size`` for features cut to its longest, on the interface's device.

    If ``network`` does not use prefixes, this only gives the places of rows. Without padding no masks are made, since
    attention is faster without.
    """
    assert interface.row_offsets is not None  # of a base with prefixes
    rows, row_is_real = interface.row_places(prefix.lengths, len(interface.row_offsets) + size.longest)
    uses_prefix = network.options.uses_prefix
    tokens = prefix.control[:, : size.longest_control if uses_prefix else 0].to(rows.device, non_blocking=True)
    places = torch.arange(tokens.shape[1], device=rows.device)[None]
    is_real = None
    if size.is_padded and uses_prefix:
        is_real = places < prefix.num_control.to(rows.device, non_blocking=True)[:, None]
    control_places = Places(control=network.encode_places(places).expand(len(rows), -1, -1))
    return Layout(
        network.encode_places(rows),
        row_is_real if size.is_padded else None,
        EmbeddedControl(tokens, is_real, control_places),
    )


def lay_out_branches(network: ShortcutNetwork, interface: TokenInterface, context: Context) -> list[Layout]:
    """Lay out the guidance branches of ``context``, each cut to the longest in its branch; [] without a prefix."""
    if (prefix := context.prefix) is None:
        return []
    sizes = context.prefix_sizes or map(PrefixSize.of, prefix.lengths.tolist(), prefix.num_control.tolist())
    branches = map(Prefix._make, zip(*prefix, strict=True))
    return [lay_out(network, interface, own, size) for own, size in zip(branches, sizes, strict=True)]


def lay_out_transition(network: ShortcutNetwork, interface: TokenInterface, batch: Transition) -> Layout | None:
    """Lay out the prefixes of ``batch``, whose features are cut to the longest; None without prefixes."""
    if batch.prefix is None:
        return None
    assert batch.prefix_size is not None
    return lay_out(network, interface, batch.prefix, batch.prefix_size)


def embed_control(interface: TokenInterface, control: Control, layout: Layout | None = None) -> EmbeddedControl:
    """Embed ``control`` (B, K), after the tokens of the prefix in ``layout``, if there is one."""
    committed = interface.embed(control.tokens, control.positions)
    places = Places(committed=control.positions, committed_rows=interface.rows_of(control.positions))
    if layout is None:
        return EmbeddedControl(committed, control.is_real, places)
    prefix, index = layout.control, control.positions[..., None].expand(-1, -1, layout.rows.shape[-1])
    assert prefix.places.control is not None
    return EmbeddedControl(
        tokens=torch.cat([prefix.tokens.to(committed.dtype), committed], dim=1),
        is_real=joined_masks([(prefix.tokens[..., 0], prefix.is_real), (control.tokens, control.is_real)]),
        places=places._replace(
            rows=layout.rows,
            control=torch.cat([prefix.places.control, layout.rows.gather(1, index)], dim=1),
            is_real=layout.is_real,
        ),
    )


def _rows(interface: TokenInterface, masked: Tensor, num_rows: int) -> Rows:
    """Return the rows, of ``num_rows`` (S), of ``masked`` tokens, (B, M) or a mask (B, L)."""
    if masked.dtype != torch.bool:
        if interface.num_rows == interface.num_tokens:
            return RowsAt(masked, num_rows)
        is_masked = torch.zeros(len(masked), interface.num_tokens, dtype=torch.bool, device=masked.device)
        masked = is_masked.scatter(1, masked, True)
    return RowsWhere(interface.masked_rows(masked))


def require_kind(network: ShortcutNetwork, base: BaseEnds, whose: str) -> None:
    """Check that ``network`` is made for bases of this kind and head, and its neighbourhood for this token grid.

    Raises:
        WeightsError: naming the base, ``whose``, and the class of networks or the argument for it.
    """
    interface, options = base.interface, network.options
    has_places = interface.row_offsets is not None
    if network.uses_places != has_places:
        raise WeightsError(
            f"{whose}: its interface has {'' if has_places else 'no '}places of rows in a sequence; expected a "
            f"{'LLaDAShortcutNet' if has_places else 'ShortcutNet'}, found a {type(network).__name__}"
        )
    if options.guided and not interface.is_linear:
        raise WeightsError(
            f"{whose}: its head is not linear, so guidance cannot precede it; a guided shortcut needs that"
        )
    if not options.grid:
        return
    if base.spec.grid != (grid := (options.grid, options.grid)):
        raise WeightsError(f"{whose}: its tokens lie on a grid of {base.spec.grid}; grid of the shortcut gives {grid}")
    if (num_rows := (options.grid // options.stride) ** 2) != interface.num_rows:
        raise WeightsError(
            f"{whose}: its features have {interface.num_rows} image rows; "
            f"stride {options.stride} of the shortcut gives {num_rows}"
        )


def joined_masks(parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """Return the mask (B, K), false at padding, of tokens (B, Kᵢ) and their masks side by side; None without padding.

    A mask of None means that all tokens are real.
    """
    if all(is_real is None for _, is_real in parts):
        return None
    masks = [torch.ones_like(of, dtype=torch.bool) if is_real is None else is_real for of, is_real in parts]
    return torch.cat(masks, dim=1)
