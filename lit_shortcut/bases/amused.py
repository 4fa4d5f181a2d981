"""aMUSEd (Patil et al., arXiv 2401.01808) from diffusers' own parts: published weights, or their sizes without."""

from __future__ import annotations

from copy import copy
from typing import Literal

import torch
from diffusers import UVit2DModel, VQModel
from torch import Tensor, nn

from lit_shortcut.bases.clip_text import CLIPText, EncodedBase, EncodedContext, TextEncoder
from lit_shortcut.bases.frozen import seeded
from lit_shortcut.bases.saved import (
    DIFFUSERS,
    TRANSFORMERS,
    Variant,
    build,
    cast,
    file_patterns,
    read_weights,
    take,
)
from lit_shortcut.bases.vq import decoder_of, load_vqvae, patch_size, random_vqvae
from lit_shortcut.contracts import Clock, Context, ImageDecoder, TokenSpec
from lit_shortcut.hub import local_folder
from lit_shortcut.interface import TokenInterface
from lit_shortcut.weights import Precision

Resolution = Literal[256, 512]

_HEAD = "mlm_layer.conv2."


class AMUSEd(EncodedBase):
    """A frozen aMUSEd with its text encoder and image decoder.

    Features are the rows before the last 1×1 convolution, which is the head: one for each token, row by row. The base
    has no position embedding; places differ by what convolutions see at the border of the grid.

    Args:
        transformer: the network that is accelerated; the base shares and freezes its weights.
        tokenizer: decodes image tokens to images.
        text_encoder: encodes prompts.
        height: height of the images in pixels; None takes the size that the transformer was trained for.
        width: width of the images in pixels, likewise.
        patch_size: side in pixels of the square that a token stands for.
        negative: prompt of the unconditional branch.

    Raises:
        ValueError: if height or width is not a positive multiple of the squares that the transformer sees.
    """

    def __init__(
        self,
        transformer: UVit2DModel,
        tokenizer: ImageDecoder,
        text_encoder: TextEncoder,
        *,
        height: int | None = None,
        width: int | None = None,
        patch_size: int = 16,
        negative: str = "",
    ) -> None:
        config = transformer.config
        default, stride = config.sample_size * patch_size, 2 if config.downsample else 1
        size = (default if height is None else height, default if width is None else width)
        transformer.eval().requires_grad_(False)
        super().__init__(_without_head(transformer), tokenizer, text_encoder, negative, size, patch_size, stride)
        self.interface = interface_of(transformer, self.grid[0] * self.grid[1])
        self.spec = TokenSpec(
            num_tokens=self.interface.num_tokens,
            sequence_length=self.interface.num_tokens,
            width=config.in_channels,
            codebook_size=config.codebook_size,
            mask_id=config.vocab_size - 1,
            num_classes=0,
            grid_height=self.grid[0],
        )

    def weights(self) -> dict[str, Tensor]:
        """Weights of the transformer, with those of the head that it lacks here."""
        head = {f"{_HEAD}weight": self.interface.head_weight[..., None, None]}
        if self.interface.head_bias is not None:
            head[f"{_HEAD}bias"] = self.interface.head_bias
        return super().weights() | head

    def features(self, tokens: Tensor, context: Context, clock: Clock) -> Tensor:
        """Features (G, B, L, C), both branches in one batch."""
        assert isinstance(context, EncodedContext)
        branches = len(context.states)
        hidden: Tensor = self.transformer(
            tokens.repeat(branches, 1).unflatten(1, self.grid),
            encoder_hidden_states=context.states.flatten(0, 1).to(self.transformer.dtype),
            pooled_text_emb=context.pooled.flatten(0, 1),
            micro_conds=context.micro_conds.flatten(0, 1),
        )
        return hidden.flatten(2).transpose(1, 2).unflatten(0, (branches, -1))


def interface_of(transformer: UVit2DModel, num_tokens: int) -> TokenInterface:
    """Return the cheap ends of ``transformer`` for ``num_tokens`` (L): the head is its last 1×1 convolution."""
    config, head, embed = transformer.config, transformer.mlm_layer.conv2, transformer.embed
    codes = embed.layer_norm(embed.embeddings.weight[: config.codebook_size])
    if config.in_channels == config.block_out_channels:  # as published; otherwise only the features' width is here
        codes = embed.conv(codes[..., None, None])[..., 0, 0]
    return TokenInterface(num_tokens, codes, head.weight[..., 0, 0], head_bias=head.bias)


def _without_head(transformer: UVit2DModel) -> UVit2DModel:
    """Return a ``transformer`` of the same weights that outputs the input of its last convolution."""
    body, last = copy(transformer), copy(transformer.mlm_layer)
    last._modules = last._modules | {"conv2": nn.Identity()}
    body._modules = body._modules | {"mlm_layer": last}
    return body


def published(
    source: str,
    *,
    height: int | None = None,
    width: int | None = None,
    negative: str = "",
    variant: Variant | None = None,
    dtype: Precision = "bfloat16",
) -> AMUSEd:
    """The base with published weights.

    Args:
        source: folder, or address on the hub: ``hf://amused/amused-256``, ``hf://amused/amused-512``.
        height: height of the images in pixels; None takes the size the weights were trained for.
        width: width of the images in pixels, likewise.
        negative: prompt of the unconditional branch.
        variant: ``fp16`` takes the files in half precision.
        dtype: dtype of transformer and text encoder; the image decoder runs in float32.

    Raises:
        WeightsError: if a file is unavailable, damaged, or does not fit the others.
        ValueError: if height or width does not fit the transformer.
    """
    folder = local_folder(
        source,
        [
            *file_patterns("transformer", DIFFUSERS, variant),
            *file_patterns("vqvae", DIFFUSERS, variant),
            *file_patterns("text_encoder", TRANSFORMERS, variant),
            "tokenizer/*",
        ],
    )
    own_dtype = getattr(torch, dtype)
    transformer = build(UVit2DModel, folder / "transformer", own_dtype)
    config = transformer.config
    vqvae = load_vqvae(folder / "vqvae", variant, config.codebook_size)
    decoder, sizes = decoder_of(vqvae, height, width, _default_pixels(transformer, vqvae))  # refuses sizes, so first
    take(transformer, read_weights(folder / "transformer", DIFFUSERS, variant, own_dtype), folder / "transformer")
    widths = (config.encoder_hidden_size, config.cond_embed_dim)
    text_encoder = CLIPText.load(folder / "text_encoder", folder / "tokenizer", variant, own_dtype, widths)
    return AMUSEd(transformer, decoder, text_encoder, negative=negative, **sizes)


def random_weights(
    resolution: Resolution = 512,
    *,
    depth: int = 22,
    text_depth: int = 12,
    dtype: Precision = "bfloat16",
    seed: int = 0,
) -> AMUSEd:
    """The base at published sizes with random weights: for latency and memory, never for quality.

    Its fingerprint begins with ``random-``. Text tokens are the bytes of a prompt.

    Args:
        resolution: side of the images in pixels.
        depth: transformer layers between the convolutions.
        text_depth: layers of the text encoder.
        dtype: dtype of transformer and text encoder.
        seed: seed of the weights.
    """
    own_dtype, resampled = getattr(torch, dtype), resolution != 256
    with seeded(seed):
        transformer = UVit2DModel(
            sample_size=resolution // 16, downsample=resampled, upsample=resampled, num_hidden_layers=depth
        )
        text_encoder = CLIPText.random(768, text_depth, num_heads=12, activation="quick_gelu", dtype=own_dtype)
        vqvae = random_vqvae()
    decoder, sizes = decoder_of(vqvae, None, None, _default_pixels(transformer, vqvae))
    base = AMUSEd(cast(transformer, own_dtype), decoder, text_encoder, negative="", **sizes)
    base.label = "random-"
    return base


def _default_pixels(transformer: UVit2DModel, vqvae: VQModel) -> int:
    """Side in pixels of the images that ``transformer`` was trained for."""
    tokens: int = transformer.config.sample_size
    return tokens * patch_size(vqvae)
