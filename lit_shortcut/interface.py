"""Cheap ends of a base, stored beside the shards so that a shortcut is trained without the base."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

_EPS = 1e-6  # in Meissonic's norms


class Places(NamedTuple):
    """Places of a shortcut's control tokens and of the features' rows.

    Where rows have places in a sequence, ``rows`` (B, S, E) are those of the features and ``control`` (B, P + K, E)
    those of all control tokens, a prefix's first; the network that uses them has encoded both, once for all steps, and
    ``is_real`` (B, S) is false at padding, None if there is no padding. ``committed`` (B, K) are the last K control
    tokens' places among the image tokens, ``committed_rows`` (B, K) the rows of the features that stand for these.
    """

    rows: Tensor | None = None
    control: Tensor | None = None
    is_real: Tensor | None = None
    committed: Tensor | None = None
    committed_rows: Tensor | None = None


class TokenInterface(nn.Module):
    """Embedding of image tokens and the head that turns features into logits over the codebook.

    Letters: L image tokens, S rows of the features, C width, V codebook. Tensors that a base does not use are None
    (``position_embedding`` with rotary positions, else ``row_offsets``). Nothing here is trained: the tensors are
    buffers, shared with the base until either is moved or cast.

    The first rows of the features are the image's: one for each token here, fewer in a subclass whose head spreads them
    over a finer grid (``num_rows``, ``rows_of`` and ``masked_rows`` map between them).

    Args:
        num_tokens: L; the first L rows of the features are the image tokens.
        code_embedding: (V, C), the base's own embedding of each code.
        head_weight: (V, C), the rows of the base's head for codes.
        position_embedding: (L, C) added to the embedding of a token at its place, or None.
        head_bias: (V,) or (L, V), added to the logits at all places or at each, or None.
        row_offsets: (S − P,) for a base whose sequence begins with a prompt of P tokens: places, counted from the
            prompt's end, of the image tokens and then of the tokens that frame them. The prompt's own rows come last.
            None if rows have no places in a sequence.

    Raises:
        ValueError: if a tensor has another shape.
    """

    SIZES: ClassVar[tuple[str, ...]] = ("num_tokens",)
    """Arguments that are integers; all others are tensors."""

    is_linear: ClassVar[bool] = True
    """True if the head is linear but for its bias, so that guidance may precede it and the head runs only once."""

    code_embedding: Tensor
    head_weight: Tensor
    position_embedding: Tensor | None
    head_bias: Tensor | None
    row_offsets: Tensor | None

    def __init__(
        self,
        num_tokens: int,
        code_embedding: Tensor,
        head_weight: Tensor,
        position_embedding: Tensor | None = None,
        head_bias: Tensor | None = None,
        row_offsets: Tensor | None = None,
    ) -> None:
        super().__init__()
        codes, width = code_embedding.shape
        for name, tensor, shapes in (
            ("head_weight", head_weight, [(codes, head_weight.shape[-1])]),
            ("position_embedding", position_embedding, [(num_tokens, width)]),
            ("head_bias", head_bias, [(codes,), (num_tokens, codes)]),
        ):
            if tensor is not None and tuple(tensor.shape) not in shapes:
                wanted = " or ".join(map(str, shapes))
                raise ValueError(f"{name}: expected the shape {wanted}, found {tuple(tensor.shape)}")
        self.num_tokens = num_tokens
        self.register_buffer("code_embedding", code_embedding)
        self.register_buffer("head_weight", head_weight)
        self.register_buffer("position_embedding", position_embedding)
        self.register_buffer("head_bias", head_bias)
        self.register_buffer("row_offsets", row_offsets)

    @property
    def kind(self) -> str:
        """Name under which :meth:`from_tensors` knows this class."""
        return type(self).__name__

    @property
    def num_rows(self) -> int:
        """Rows of the features that are the image's; they come first."""
        return self.num_tokens

    def rows_of(self, positions: Tensor) -> Tensor:
        """Rows (...) of the features that give the logits of image places ``positions`` (...)."""
        return positions

    def masked_rows(self, is_masked: Tensor) -> Tensor:
        """Image rows (..., ``num_rows``) that give the logits of places where ``is_masked`` (..., L)."""
        return is_masked

    def to_tensors(self) -> dict[str, Tensor]:
        """Return copies on the CPU of everything :meth:`from_tensors` needs beside ``kind``."""
        copies = {  # a base may tie embedding and head, and safetensors refuses shared memory
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.state_dict().items()
        }
        return copies | {name: torch.tensor(getattr(self, name)) for name in self.SIZES}

    @staticmethod
    def from_tensors(kind: str, tensors: dict[str, Tensor]) -> TokenInterface:
        """Build the interface of class ``kind`` from the result of :meth:`to_tensors`.

        Raises:
            ValueError: if ``kind`` is unknown, or ``tensors`` are missing, unknown, misshapen or not finite.
        """
        known = {cls.__name__: cls for cls in (TokenInterface, ConvolutionalInterface)}
        if kind not in known:
            raise ValueError(f"kind of interface: expected {' or '.join(known)}, found {kind!r}")
        infinite = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        if infinite:
            raise ValueError(f"{', '.join(infinite)}: expected finite numbers")
        arguments: dict[str, Any] = dict(tensors)
        try:
            arguments |= {name: int(tensors[name]) for name in known[kind].SIZES}
            return known[kind](**arguments)
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"tensors of a {kind}: {error}") from error

    def row_places(self, prompt_lengths: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Places (B, S) in the sequence of the first ``num_rows`` (S) rows, and a mask (B, S), false at padding.

        ``prompt_lengths`` (B,) are P for each sample; rows after a shorter prompt are padding. The results are on the
        interface's device.

        Raises:
            ValueError: if rows of this base have no places.
        """
        if self.row_offsets is None:
            raise ValueError("rows of this base's features have no places in a sequence")
        offsets, prompt_lengths = self.row_offsets, prompt_lengths.to(self.row_offsets.device, non_blocking=True)
        prompt = torch.arange(num_rows - len(offsets), device=offsets.device).expand(len(prompt_lengths), -1)
        places = torch.cat([prompt_lengths[:, None] + offsets, prompt], dim=1)
        rows = torch.arange(num_rows, device=offsets.device)
        return places, rows < len(offsets) + prompt_lengths[:, None]

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Control tokens (B, K, C): embedding of codes ``tokens`` (B, K) at image ``positions`` (B, K)."""
        embedded = self.code_embedding[tokens]
        return embedded if self.position_embedding is None else embedded + self.position_embedding[positions]

    def logits(self, features: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits (..., B, M, V) of ``features`` (..., B, S, C), whose first rows are the image's.

        ``positions`` (B, M) selects image places; None takes all L. The head runs only on those.
        """
        if positions is None:
            logits = self._without_bias(features[..., : self.num_tokens, :])
            return logits if self.head_bias is None else logits + self.head_bias
        return self.row_logits(self.rows_at(features, positions), positions)

    def rows_at(self, features: Tensor, positions: Tensor) -> Tensor:
        """Rows (..., B, M, C) of ``features`` (..., B, S, C) that give the logits at ``positions`` (B, M)."""
        index = self.rows_of(positions)[..., None].expand(*features.shape[:-2], -1, features.shape[-1])
        return torch.gather(features, -2, index)

    def row_logits(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Logits (..., V) of ``rows`` (..., C) of the features, which belong to image ``positions`` (...)."""
        logits = self._without_bias(rows)
        if self.head_bias is None:
            return logits
        return logits + (self.head_bias if self.head_bias.dim() == 1 else self.head_bias[positions])

    def _without_bias(self, rows: Tensor) -> Tensor:
        return rows @ self.head_weight.T.to(rows.dtype)


class ConvolutionalInterface(TokenInterface):
    """Head of two 1×1 convolutions after an upsampling of rows that stand for several tokens each (Meissonic).

    It equals diffusers' ``ConvMlmLayer`` after its ``Upsample2D`` by a transposed convolution whose kernel is its
    stride: RMS norm, stride² matrices, C → C' matrix, RMS norm, head. Each place depends only on its own row. As in
    diffusers, norms are computed in float32 and have an eps of 1e-6.

    Args:
        num_tokens: L, on a grid.
        grid_width: tokens in a row of the grid.
        stride: side in tokens of the square that a row of the features stands for.
        code_embedding: (V, C).
        head_weight: (V, C').
        hidden_weight: (C', C), the convolution before the head.
        hidden_scale: (C'), scale of the norm between them.
        upsampling_scale: (C), scale of the norm before the upsampling; None if ``stride`` is 1.
        upsampling_weight: (stride², C, C), from a row to each of its tokens, row by row; None if ``stride`` is 1.

    Raises:
        ValueError: if the grid's sides are not multiples of ``stride``, or the upsampling has another shape.
    """

    SIZES: ClassVar[tuple[str, ...]] = ("num_tokens", "grid_width", "stride")
    is_linear = False

    hidden_weight: Tensor
    hidden_scale: Tensor
    upsampling_scale: Tensor | None
    upsampling_weight: Tensor | None
    slots: Tensor
    """Index (L,) of each place among the rows' squares, one square after the other."""

    def __init__(
        self,
        num_tokens: int,
        grid_width: int,
        stride: int,
        code_embedding: Tensor,
        head_weight: Tensor,
        hidden_weight: Tensor,
        hidden_scale: Tensor,
        upsampling_scale: Tensor | None = None,
        upsampling_weight: Tensor | None = None,
    ) -> None:
        super().__init__(num_tokens, code_embedding, head_weight)
        self.grid_width, self.stride = grid_width, stride
        if min(num_tokens, grid_width, stride) < 1 or num_tokens % (grid_width * stride) or grid_width % stride:
            raise ValueError(
                f"expected a grid whose sides are multiples of {stride}, found {num_tokens} tokens, {grid_width} a row"
            )
        shape = None if upsampling_weight is None else tuple(upsampling_weight.shape)
        width = code_embedding.shape[-1]
        if shape != (None if stride == 1 else (stride**2, width, width)):
            raise ValueError(f"upsampling_weight: expected width {width} and stride {stride}, found shape {shape}")
        if (upsampling_scale is None) != (upsampling_weight is None):
            raise ValueError("upsampling_scale and upsampling_weight belong together, found one of them")
        self.register_buffer("hidden_weight", hidden_weight)
        self.register_buffer("hidden_scale", hidden_scale)
        self.register_buffer("upsampling_scale", upsampling_scale)
        self.register_buffer("upsampling_weight", upsampling_weight)
        place = torch.arange(num_tokens, device=code_embedding.device)
        row, column = place // grid_width, place % grid_width
        cell = row // stride * (grid_width // stride) + column // stride
        slots = cell * stride**2 + row % stride * stride + column % stride
        self.register_buffer("slots", slots, persistent=False)

    @property
    def num_rows(self) -> int:
        """Rows of the features that are the image's: L / stride²."""
        return self.num_tokens // self.stride**2

    def rows_of(self, positions: Tensor) -> Tensor:
        """Rows (...) of the features that give the logits of image places ``positions`` (...)."""
        return self.slots[positions] // self.stride**2

    def masked_rows(self, is_masked: Tensor) -> Tensor:
        """Image rows (..., ``num_rows``) with at least one place where ``is_masked`` (..., L)."""
        return is_masked[..., self.slots.argsort()].unflatten(-1, (self.num_rows, -1)).any(dim=-1)

    def logits(self, features: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits (..., B, M, V) of ``features`` (..., B, S, C), whose first rows are the image's.

        ``positions`` (B, M) selects image places; None takes all L, row by row.
        """
        slots = self._upsampled(features[..., : self.num_rows, :]).flatten(-3, -2)
        index = self.slots if positions is None else self.slots[positions]
        return self._head(torch.gather(slots, -2, index[..., None].expand(*slots.shape[:-2], -1, slots.shape[-1])))

    def row_logits(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Logits (..., V) at image ``positions`` (...), given the ``rows`` (..., C) of the features they belong to."""
        index = (self.slots[positions] % self.stride**2)[..., None, None].expand(*rows.shape[:-1], 1, rows.shape[-1])
        return self._head(torch.gather(self._upsampled(rows), -2, index).squeeze(-2))

    def _upsampled(self, rows: Tensor) -> Tensor:
        """Map rows (..., C) to their tokens (..., stride², C)."""
        if self.upsampling_weight is None or self.upsampling_scale is None:
            return rows[..., None, :]
        normed = _rms_norm(rows, self.upsampling_scale)
        weight = self.upsampling_weight.flatten(0, 1).to(normed.dtype)
        return (normed @ weight.T).unflatten(-1, (self.stride**2, -1))

    def _head(self, tokens: Tensor) -> Tensor:
        return self._without_bias(_rms_norm(tokens @ self.hidden_weight.T.to(tokens.dtype), self.hidden_scale))


def _rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    normed = x * torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + _EPS)
    return normed.to(x.dtype) * scale.to(x.dtype)
