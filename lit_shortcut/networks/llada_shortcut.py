"""Shortcut network of LLaDA-like bases: the same skeleton as MaskGIT's, with LLaDA's parts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lit_shortcut.bounds import require_above, require_at_least
from lit_shortcut.hub import local_file
from lit_shortcut.interface import Places
from lit_shortcut.networks.llada import LLaDABlock, RMSNorm, Rotation, rotation
from lit_shortcut.networks.rows import ALL_ROWS, Options, RowChoice, Rows
from lit_shortcut.networks.shortcut import ShortcutNetwork, published_sizes
from lit_shortcut.published import Names, fill, load_state
from lit_shortcut.weights import WeightsError, load_module

NAMES = Names(
    [
        ("proj_in.", "narrow_features."),
        ("new_token_proj_in.", "narrow_control."),
        ("ln_f.", "last."),
        ("time_embedder.mlp.", "time_mlp."),
        ("adaLN_modulation.", "modulation."),
        ("proj_out.", "widen."),
    ]
)
"""Names of tensors in the published DiMOO-Shortcut and ours; other names are the same."""


class CrossAndSelf(nn.Module):
    """Attention to the control tokens, then among the rows, each a LLaDA block that can be left out."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_width: int,
        norm_eps: float,
        uses_control: bool = True,
        uses_self_attention: bool = True,
    ) -> None:
        super().__init__()
        self.cross_attn = LLaDABlock(width, num_heads, mlp_width, norm_eps) if uses_control else None
        self.self_attn = LLaDABlock(width, num_heads, mlp_width, norm_eps) if uses_self_attention else None

    def forward(
        self,
        own: Tensor,
        own_by: Rotation,
        x: Tensor,
        by: Rotation,
        control: tuple[Tensor, Rotation] | None,
        control_is_real: Tensor | None,
        is_real: Tensor | None,
        rows: Rows = ALL_ROWS,
    ) -> Tensor:
        """Map ``own``, ``rows`` of (B, S, c), given ``control`` (B, K, c), each with its rotation and padding.

        All rows are attended to; those that do not change are as in ``x`` (B, S, c).
        """
        if self.cross_attn is not None:
            own = self.cross_attn(own, own_by, control_is_real, memory=control)
        if self.self_attn is None:
            return own
        if rows is ALL_ROWS:
            return self.self_attn(own, by, is_real)
        return self.self_attn(own, own_by, is_real, memory=(rows.put(x, own), by))


class LLaDAShortcutNet(ShortcutNetwork):
    """Average velocity of a LLaDA's features; each control token is rotated by its own place in the sequence.

    Args:
        width: C, width of the base's features.
        num_heads: attention heads, as many as the base has.
        mlp_width: hidden width of the SwiGLUs, that of the base.
        rope_theta: base of the rotary frequencies, that of the base.
        norm_eps: eps of the RMS norms.
        bottleneck_ratio: C over the network's own width c, at least 1; at 1 there are no projections.
        num_blocks: blocks in a row.
        uses_time: condition on the masked share r.
        uses_control: attend to the tokens just committed.
        uses_prefix: attend to the tokens of the prompt.
        uses_self_attention: attend to all rows.
        rows: predict ``all`` rows, as published, or only those still ``masked``.
        anchored: predict from the last full step.
        grid: side of the square token grid, for the neighbourhood, convolutions and states.
        reach: places that a committed token reaches in the neighbourhood; 0 leaves it out, as published.
        guided: predict the features after guidance, in one pass for both branches, with the conditional one's prompt.
        num_convs: convolutions of the rows on the token grid, each with an MLP, after the blocks.
        uses_states: embed whether a row is still masked, was committed since the features were computed, or before.

    Raises:
        ValueError: if the ratio is below 1, c is not a multiple of twice ``num_heads``, or options are incompatible.
    """

    uses_places = True

    def __init__(
        self,
        width: int,
        num_heads: int = 32,
        mlp_width: int = 12288,
        rope_theta: float = 500_000.0,
        norm_eps: float = 1e-5,
        bottleneck_ratio: float = 2.0,
        num_blocks: int = 1,
        uses_time: bool = True,
        uses_control: bool = True,
        uses_prefix: bool = True,
        uses_self_attention: bool = True,
        rows: RowChoice = "all",
        anchored: bool = False,
        grid: int = 0,
        reach: int = 0,
        guided: bool = False,
        num_convs: int = 0,
        uses_states: bool = False,
    ) -> None:
        options = Options(
            width,
            bottleneck_ratio,
            num_blocks,
            uses_time,
            uses_control,
            uses_prefix,
            uses_self_attention,
            rows,
            anchored,
            grid,
            reach,
            guided=guided,
            num_convs=num_convs,
            uses_states=uses_states,
        )
        require_at_least(1, num_heads=num_heads, mlp_width=mlp_width)
        require_above(0, rope_theta=rope_theta, norm_eps=norm_eps)
        inner = options.inner
        blocks = nn.ModuleList(
            CrossAndSelf(inner, num_heads, mlp_width, norm_eps, uses_control, uses_self_attention)
            for _ in range(num_blocks)
        )
        super().__init__(options, blocks, RMSNorm(inner, norm_eps))
        self.hparams = options.hparams() | {
            "num_heads": num_heads,
            "mlp_width": mlp_width,
            "rope_theta": rope_theta,
            "norm_eps": norm_eps,
        }
        del self.hparams["stride"]  # a row of such a base is a token
        self.num_heads, self.rope_theta = num_heads, rope_theta

    @classmethod
    def load(cls, path: Path) -> LLaDAShortcutNet:
        """Load the frozen network at ``path``; raises :class:`~lit_shortcut.weights.WeightsError` if it fails."""
        return load_module(cls, path)

    @classmethod
    def load_published(
        cls, path: str, num_heads: int = 32, rope_theta: float = 500_000.0, norm_eps: float = 1e-5
    ) -> LLaDAShortcutNet:
        """Load the published state dict at ``path``, a path or an ``hf://`` address, frozen.

        Sizes are read from its tensors; heads, frequencies and epsilon, which tensors do not show, are the base's.

        Raises:
            WeightsError: if the file is unavailable, damaged, or not a DiMOO-Shortcut.
        """
        file = local_file(path)
        state = load_state(file)
        try:
            sizes = published_sizes(state, inner=len(state["ln_f.weight"]))
            mlp_width = len(state["blocks.0.cross_attn.ff_proj.weight"])
            with torch.device("meta"):
                network = cls(
                    num_heads=num_heads, mlp_width=mlp_width, rope_theta=rope_theta, norm_eps=norm_eps, **sizes
                )
        except (KeyError, IndexError) as error:
            raise WeightsError(f"{file}: expected a DiMOO-Shortcut state dict; {error} is missing") from error
        except ValueError as error:
            raise WeightsError(f"{file}: {error}") from error
        fill(network, state, NAMES, file)
        return network

    def encode_places(self, places: Tensor) -> Tensor:
        """Return the rotations at ``places`` (B, S): ``cos``, then ``sin``, float32 (B, S, 2 D)."""
        by = rotation(places, self.options.inner // self.num_heads, self.rope_theta)
        return torch.cat(by, dim=-1).squeeze(1)

    def refine(self, x: Tensor, control: Tensor, is_real: Tensor | None, places: Places | None, rows: Rows) -> Tensor:
        """Apply the blocks to ``rows`` of ``x`` (B, S, c), and return them.

        Raises:
            ValueError: if there are no ``places``.
        """
        if places is None or places.rows is None or places.control is None:
            raise ValueError("LLaDAShortcutNet rotates rows by their places, but the base's interface has none")
        by, control_by = (Rotation(*part[:, None].chunk(2, dim=-1)) for part in (places.rows, places.control))
        own, own_by = rows.take(x), Rotation(*(rows.take(part[:, 0])[:, None] for part in by))
        memory = (control, control_by)
        for block in self.blocks:
            own = block(own, own_by, x, by, memory, is_real, places.is_real, rows)
        return own
