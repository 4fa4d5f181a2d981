"""Transformer of Meissonic (Bai et al., arXiv 2410.08261), made of diffusers' parts under its published names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, TimestepEmbedding, get_timestep_embedding
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.models.unets.uvit_2d import ConvMlmLayer, UVit2DConvEmbed
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from lit_shortcut.bounds import require_at_least
from lit_shortcut.interface import ConvolutionalInterface

_EPS = 1e-6
_ROPE_THETA = 10_000
_MICRO_CONDS, _MICRO_WIDTH = 5, 256  # five numbers, each embedded in so many sinusoids
TIME_SCALE = 1000
"""Factor of the number of steps left, as in the reference."""


class MeissonicTransformer(nn.Module):
    """Transformer from image tokens and encoded prompts to features.

    Text and image rows go through blocks with weights of their own for each (``num_layers``), then through blocks that
    share theirs (``num_single_layers``). The arguments are those of the published configuration.

    Args:
        num_layers: blocks of two streams.
        num_single_layers: blocks of one stream.
        attention_head_dim: width of a head.
        num_attention_heads: heads; C is both multiplied.
        joint_attention_dim: width of the text encoder's states.
        pooled_projection_dim: width of its pooled state, C.
        axes_dims_rope: parts of a head's width that time, row and column rotate.
        vocab_size: rows of the embedding table; the last is the mask.
        codebook_size: V.
        downsample: the blocks see squares of 2×2 tokens.
        upsample: the head splits them again; equal to ``downsample``.

    Raises:
        ValueError: if sizes do not fit one another.
    """

    def __init__(
        self,
        num_layers: int = 14,
        num_single_layers: int = 28,
        attention_head_dim: int = 128,
        num_attention_heads: int = 8,
        joint_attention_dim: int = 1024,
        pooled_projection_dim: int = 1024,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        vocab_size: int = 8256,
        codebook_size: int = 8192,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        require_at_least(0, num_layers=num_layers, num_single_layers=num_single_layers)
        require_at_least(1, num_attention_heads=num_attention_heads, codebook_size=codebook_size)
        require_at_least(1, attention_head_dim=attention_head_dim, joint_attention_dim=joint_attention_dim)
        heads, head_width = num_attention_heads, attention_head_dim
        width = heads * head_width
        if pooled_projection_dim != width:
            raise ValueError(f"pooled_projection_dim must be the width {width}, got {pooled_projection_dim}")
        if sum(axes_dims_rope) != head_width or len(axes_dims_rope) != 3 or any(axis % 2 for axis in axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope must be three even numbers that sum to attention_head_dim {head_width}, "
                f"got {list(axes_dims_rope)}"
            )
        if downsample != upsample:
            raise ValueError(f"upsample must be as downsample, got {upsample} and {downsample}")
        if codebook_size >= vocab_size:
            raise ValueError(f"codebook_size must lie below vocab_size {vocab_size}, got {codebook_size}")
        self.hparams: dict[str, Any] = {
            "num_layers": num_layers,
            "num_single_layers": num_single_layers,
            "attention_head_dim": attention_head_dim,
            "num_attention_heads": num_attention_heads,
            "joint_attention_dim": joint_attention_dim,
            "pooled_projection_dim": pooled_projection_dim,
            "axes_dims_rope": list(axes_dims_rope),
            "vocab_size": vocab_size,
            "codebook_size": codebook_size,
            "downsample": downsample,
            "upsample": upsample,
        }
        self.width, self.codebook_size, self.mask_id = width, codebook_size, vocab_size - 1
        self.stride = 2 if downsample else 1
        self.pos_embed = FluxPosEmbed(_ROPE_THETA, list(axes_dims_rope))
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(width, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            FluxTransformerBlock(width, heads, head_width) for _ in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(width, heads, head_width) for _ in range(num_single_layers)
        )
        self.embed = UVit2DConvEmbed(width, width, vocab_size, True, _EPS, False)
        self.mlm_layer = ConvMlmLayer(width, width, False, True, _EPS, codebook_size)
        self.cond_embed = TimestepEmbedding(
            _MICRO_CONDS * _MICRO_WIDTH + pooled_projection_dim, width, sample_proj_bias=False
        )
        self.encoder_proj_layer_norm = RMSNorm(width, _EPS)
        self.project_to_hidden_norm, self.project_from_hidden_norm = RMSNorm(width, _EPS), RMSNorm(width, _EPS)
        self.project_to_hidden = nn.Linear(width, width, bias=False)
        self.project_from_hidden = nn.Linear(width, width, bias=False)
        resampling = {
            "kernel_size": 2,
            "padding": 0,
            "norm_type": "rms_norm",
            "eps": _EPS,
            "elementwise_affine": True,
            "bias": False,
        }
        down = {"downsample": Downsample2D(width, use_conv=True, name="Conv2d_0", **resampling)} if downsample else {}
        up = (
            {"upsample": Upsample2D(width, use_conv_transpose=True, interpolate=False, **resampling)}
            if upsample
            else {}
        )
        self.down_block, self.up_block = nn.ModuleDict(down), nn.ModuleDict(up)

    def forward(self, tokens: Tensor, states: Tensor, pooled: Tensor, micro_conds: Tensor, timestep: Tensor) -> Tensor:
        """Features (B, R, C) before the head, one row for each square that the blocks see, R in all.

        Args:
            tokens: (B, h, w) on the grid.
            states: (B, T, E), output of the text encoder's last layer but one.
            pooled: (B, C), its pooled state.
            micro_conds: (B, 5), see :class:`~lit_shortcut.bases.clip_text.EncodedContext`.
            timestep: (1,) or (B,), steps left after this one.
        """
        image = self.embed(tokens)
        for module in self.down_block.values():
            image = module(image)
        rotation = self._rotation(states.shape[1], image)
        image = self.project_to_hidden(self.project_to_hidden_norm(image.flatten(2).transpose(1, 2)))
        text = self.encoder_proj_layer_norm(self.context_embedder(states.to(image.dtype)))
        condition = self.condition(timestep, pooled, micro_conds, image.dtype)
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            text, image = block(image, text, condition, rotation)
        features: Tensor = self.project_from_hidden(self.project_from_hidden_norm(image))
        return features

    def condition(self, timestep: Tensor, pooled: Tensor, micro_conds: Tensor, dtype: torch.dtype) -> Tensor:
        """Modulation (B, C) of all blocks: time, size of the images and pooled state.

        Time is rounded to ``dtype`` before it is embedded, as in the reference: 63,000 to 62,976 in bfloat16.
        """
        micro = get_timestep_embedding(
            micro_conds.flatten(), _MICRO_WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        both = torch.cat([pooled, micro.unflatten(0, (len(pooled), -1)).flatten(1)], dim=1)
        pooled = self.cond_embed(both.to(self.context_embedder.weight.dtype)).to(dtype)
        condition: Tensor = self.time_text_embed(timestep.to(dtype) * TIME_SCALE, pooled)
        return condition

    def interface(self, height: int, width: int) -> ConvolutionalInterface:
        """The cheap ends on a grid of ``height`` × ``width`` tokens, sharing this transformer's parameters."""
        return interface_of(self, height, width)

    def _rotation(self, num_text: int, image: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rows' places: 0 for ``num_text`` rows of text, then row and column in ``image``."""
        height, width = image.shape[-2:]
        row, column = torch.meshgrid(
            torch.arange(height, device=image.device), torch.arange(width, device=image.device), indexing="ij"
        )
        places = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
        cosines, sines = self.pos_embed(torch.cat([places.new_zeros(num_text, 3), places]))
        return cosines, sines


def interface_of(transformer: nn.Module, height: int, width: int) -> ConvolutionalInterface:
    """Return the cheap ends of a ``transformer`` of the published names, on a grid of ``height`` × ``width`` tokens."""
    own: Any = transformer
    head, hidden = own.mlm_layer.conv2.weight, own.mlm_layer.conv1.weight
    codes = own.embed.layer_norm(own.embed.embeddings.weight[: len(head)])
    upsampling = dict(own.up_block.named_parameters())
    kernel = upsampling.get("upsample.conv.weight")  # (in, out, row, column)
    return ConvolutionalInterface(
        num_tokens=height * width,
        grid_width=width,
        stride=1 if kernel is None else kernel.shape[-1],
        code_embedding=own.embed.conv(codes[..., None, None])[..., 0, 0],
        head_weight=head[..., 0, 0],
        hidden_weight=hidden[..., 0, 0],
        hidden_scale=own.mlm_layer.layer_norm.weight,
        upsampling_scale=upsampling.get("upsample.norm.weight"),
        upsampling_weight=None if kernel is None else kernel.permute(2, 3, 1, 0).flatten(0, 1),
    )
