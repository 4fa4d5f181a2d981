"""Small image tokenizer and its training: convolutions around finite scalar quantisation (arXiv 2309.15505)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import FSQ

from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import Conditions
from lit_shortcut.images import LabelledImages
from lit_shortcut.metrics.images import ImageMetric, collection
from lit_shortcut.tasks.optimized import OptimizedTask
from lit_shortcut.weights import load_module


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        refined: Tensor = x + self.body(x)
        return refined


class FSQTokenizer(nn.Module):
    """Tokenizer from grey images to a grid of codes, one for each 2×2 pixels, and back.

    Args:
        levels: FSQ levels per channel, each at least 3; their product is the codebook size V.
        width: channels of the convolutions.
        image_size: side of the square images in pixels, even.

    Raises:
        ValueError: if ``image_size`` is odd or a level is below 3.
    """

    def __init__(self, levels: list[int], width: int, image_size: int) -> None:
        super().__init__()
        require_at_least(2, width=width, image_size=image_size)
        if image_size % 2:
            raise ValueError(f"image_size must be even, each token covers 2×2 pixels; got {image_size}")
        if not levels or min(levels) < 3:
            raise ValueError(f"levels must be at least 3 each, FSQ is skewed below that; got {levels}")
        self.hparams = {"levels": levels, "width": width, "image_size": image_size}
        self.image_size, self.grid = image_size, image_size // 2
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1),
            ResidualBlock(width),
            ResidualBlock(width),
            nn.SiLU(),
            nn.Conv2d(width, len(levels), 1),
        )
        self.quantizer = FSQ(levels)
        self.decoder = nn.Sequential(
            nn.Conv2d(len(levels), width, 3, padding=1),
            ResidualBlock(width),
            ResidualBlock(width),
            nn.SiLU(),
            nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 2, 1, 3, padding=1),
        )

    @property
    def codebook_size(self) -> int:
        """Return V, the number of codes."""
        return int(self.quantizer.codebook_size)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        return next(self.parameters()).dtype

    def forward(self, images: Tensor) -> Tensor:
        """Return reconstructions (B, 1, H, W) in [-1, 1] of ``images`` of the same form, differentiable."""
        quantized, _ = self.quantizer(self.encoder(images.to(self.dtype)))
        reconstructions: Tensor = self.decoder(quantized)
        return reconstructions

    def encode(self, images: Tensor) -> Tensor:
        """Return codes (B, L), row by row, of uint8 ``images`` (B, 1 or 3, H, W); colours are averaged to grey."""
        grey = images.float().mean(dim=1, keepdim=True) / 127.5 - 1
        _, codes = self.quantizer(self.encoder(grey.to(self.dtype)))
        return codes.flatten(1).long()

    def decode(self, tokens: Tensor) -> Tensor:
        """Return images, uint8 (B, 3, H, W), of codes ``tokens`` (B, L); the three channels are equal."""
        grid = tokens.unflatten(1, (self.grid, self.grid))
        grey = self.decoder(self.quantizer.indices_to_codes(grid))
        return ((grey.float() + 1) * 127.5).round().clamp(0, 255).byte().expand(-1, 3, -1, -1)

    @classmethod
    def load(cls, path: Path) -> FSQTokenizer:
        """Load the frozen tokenizer at ``path``; raises :class:`~lit_shortcut.weights.WeightsError` if it fails."""
        return load_module(cls, path)


class TokenizerTask(OptimizedTask):
    """Training by reconstruction: mean absolute plus mean squared error of pixels in [-1, 1].

    Args:
        tokenizer: the network to train.
        metrics: metrics of the reconstructions, by the name ``test`` logs them under.
        **optimization: optimiser and schedule, as :class:`~lit_shortcut.tasks.optimized.OptimizedTask` takes them.
    """

    network: FSQTokenizer

    def __init__(
        self,
        tokenizer: FSQTokenizer,
        *,
        metrics: dict[str, ImageMetric] | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(tokenizer, **optimization)
        self.metrics = collection(metrics or {})

    def training_step(self, batch: LabelledImages, batch_idx: int) -> Tensor:
        """Return the reconstruction loss of one batch."""
        loss = self._loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: LabelledImages, batch_idx: int) -> None:
        """Log the reconstruction loss of held-out images."""
        self.log("val/loss", self._loss(batch), prog_bar=True, batch_size=len(batch.labels))

    def test_step(self, batch: LabelledImages, batch_idx: int) -> None:
        """Measure reconstructions from codes, the best that a base with this tokenizer can do."""
        reconstructions = self.network.decode(self.network.encode(batch.pixels))
        none = torch.zeros_like(batch.labels)  # these images were not generated: they have neither ids nor seeds
        conditions = Conditions(none, none, batch.labels)
        originals = batch.pixels.expand_as(reconstructions)
        self.metrics.update(reconstructions, conditions, originals=originals)

    def on_test_epoch_end(self) -> None:
        """Log each metric, and reset it."""
        self.log_dict({f"test/{name}": value for name, value in self.metrics.compute().items()})
        self.metrics.reset()

    def _loss(self, batch: LabelledImages) -> Tensor:
        pixels = batch.pixels.float() / 127.5 - 1
        reconstructions = self.network(pixels)
        pixels = pixels.to(reconstructions.dtype)
        return F.l1_loss(reconstructions, pixels) + F.mse_loss(reconstructions, pixels)
