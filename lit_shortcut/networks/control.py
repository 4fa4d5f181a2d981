"""Control tokens as a shortcut network takes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_shortcut.contracts import Control, Prefix
from lit_shortcut.interface import Places, TokenInterface
from lit_shortcut.networks.rows import ALL_ROWS, Rows, RowsAt, RowsWhere
from lit_shortcut.networks.shortcut import ShortcutNetwork
from lit_shortcut.weights import WeightsError


class EmbeddedControl(NamedTuple):
    """The network's arguments beside the features: embeddings (B, K, C), padding (B, K), and places."""

    tokens: Tensor
    is_real: Tensor | None
    places: Places


def advance(
    network: ShortcutNetwork,
    interface: TokenInterface,
    features: Tensor,
    control: Control,
    masked_share: Tensor,
    prefix: Prefix | None = None,
    *,
    masked: Tensor | None = None,
    gap: Tensor | None = None,
) -> Tensor:
    """Predict features (B, S, C) by ``network`` from those before; training and sampling both go through here.

    Args:
        network: the shortcut.
        interface: of the base.
        features: (B, S, C), in the network's dtype.
        control: (B, K), tokens committed since.
        masked_share: (B,) r, before the step that is predicted.
        prefix: of the samples, (B, …).
        masked: places still masked, for a network that predicts those: (B, M), or a mask (B, L) where samples differ in
            number.
        gap: (B,) steps between ``features`` and the prediction, for an anchored network.
    """
    options = network.options
    embedded = embed_control(interface, control, prefix, features.shape[-2], options.uses_prefix)
    rows = ALL_ROWS
    if options.rows == "masked":
        assert masked is not None
        rows = _rows(interface, masked)
    tokens = embedded.tokens.to(features)
    predicted: Tensor = network(features, tokens, masked_share, embedded.is_real, embedded.places, rows, gap)
    return predicted


def embed_control(
    interface: TokenInterface, control: Control, prefix: Prefix | None, num_rows: int, uses_prefix: bool = True
) -> EmbeddedControl:
    """Embed ``control`` (B, K), behind the tokens of ``prefix`` if there is one, for features of ``num_rows`` (S).

    With ``uses_prefix`` false a prefix only says where rows stand. Where nothing is padded no masks are made, since
    attention is faster without. A batch of one has no padding; of others it is known where ``prefix`` has its lengths
    on the CPU.
    """
    committed = interface.embed(control.tokens, control.positions)
    if prefix is None:
        return EmbeddedControl(committed, control.is_real, Places(rows=None, control=control.positions))
    device = committed.device
    rows, row_is_real = interface.row_places(prefix.lengths, num_rows)
    assert interface.row_offsets is not None  # else it has no places
    if not uses_prefix:
        prefix = prefix._replace(control=prefix.control[:, :0], num_control=torch.zeros_like(prefix.num_control))
    num_prefix_rows, num_prefix = num_rows - len(interface.row_offsets), prefix.control.shape[1]
    prefix_places = torch.arange(num_prefix, device=device).expand(len(rows), -1)
    is_real = control.is_real
    if control.is_real is not None or _is_padded(prefix.num_control, num_prefix):
        prefix_is_real = prefix_places < prefix.num_control.to(device)[:, None]
        all_real = torch.ones_like(control.tokens, dtype=torch.bool)
        is_real = torch.cat([prefix_is_real, all_real if control.is_real is None else control.is_real], dim=1)
    return EmbeddedControl(
        tokens=torch.cat([prefix.control.to(committed), committed], dim=1),
        is_real=is_real,
        places=Places(
            rows=rows,
            control=torch.cat([prefix_places, rows.gather(1, control.positions)], dim=1),
            is_real=row_is_real if _is_padded(prefix.lengths, num_prefix_rows) else None,
        ),
    )


def _rows(interface: TokenInterface, masked: Tensor) -> Rows:
    """Rows that belong to ``masked`` tokens, (B, M) or a mask (B, L)."""
    if masked.dtype != torch.bool:
        if interface.num_rows == interface.num_tokens:
            return RowsAt(masked)
        is_masked = torch.zeros(len(masked), interface.num_tokens, dtype=torch.bool, device=masked.device)
        masked = is_masked.scatter(1, masked, True)
    return RowsWhere(interface.masked_rows(masked))


def require_kind(network: ShortcutNetwork, interface: TokenInterface, whose: str) -> None:
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


def prefix_of_branch(prefix: Prefix, branch: int) -> Prefix:
    """One guidance branch of a context's ``prefix`` (G, B, …), its control cut to the longest in it."""
    lengths, num_control = prefix.lengths[branch], prefix.num_control[branch]
    return Prefix(lengths, prefix.control[branch][:, : int(num_control.max())], num_control)


def _is_padded(lengths: Tensor, longest: int) -> bool:
    """Whether one of ``lengths`` is below ``longest``; taken for granted where asking would wait for a device."""
    return len(lengths) > 1 and (lengths.device.type != "cpu" or bool((lengths < longest).any()))
