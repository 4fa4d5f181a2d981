"""Training of small bases: predict masked tokens from the others (Chang et al., arXiv 2202.04200)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.bounds import require_share
from lit_shortcut.contracts import Clock
from lit_shortcut.decoding.schedules import share_masked
from lit_shortcut.images import CaptionedImages, ImageTokenizer, LabelledImages
from lit_shortcut.tasks.optimized import OptimizedTask

Images = TypeVar("Images", LabelledImages, CaptionedImages)


class MaskedTokensTask(OptimizedTask, Generic[Images]):
    """Cross-entropy over the codebook at masked places; the share of masked tokens is drawn from the arccos schedule.

    Args:
        network: the network to train.
        tokenizer: frozen; turns images into tokens.
        condition_drop: share of samples whose condition is dropped, for guidance.
        label_smoothing: smoothing of the cross-entropy's targets.
        **optimization: optimiser and schedule, as :class:`~lit_shortcut.tasks.optimized.OptimizedTask` takes them.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: ImageTokenizer,
        condition_drop: float,
        label_smoothing: float,
        **optimization: Any,
    ) -> None:
        super().__init__(network, **optimization)
        self.tokenizer, self.condition_drop, self.label_smoothing = tokenizer, condition_drop, label_smoothing

    @abstractmethod
    def logits(self, codes: Tensor, is_masked: Tensor, batch: Images, is_dropped: Tensor) -> Tensor:
        """Return logits (M, V) at the M places of ``codes`` (B, L) where ``is_masked`` (B, L).

        Where ``is_dropped`` (B,), the network must not see the condition.
        """

    def training_step(self, batch: Images, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        loss, _ = self._loss(batch, None)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Images, batch_idx: int) -> None:
        """Log loss and token accuracy on held-out images, with the same masks at each validation."""
        generator = torch.Generator(batch.pixels.device).manual_seed(batch_idx)
        loss, accuracy = self._loss(batch, generator)
        self.log_dict({"val/loss": loss, "val/token_accuracy": accuracy}, prog_bar=True, batch_size=len(batch.labels))

    def _loss(self, batch: Images, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            codes = self.tokenizer.encode(batch.pixels)
        draws = torch.rand(len(codes), codes.shape[1] + 2, device=codes.device, generator=generator)
        is_masked = draws[:, 2:] < share_masked("arccos", draws[:, :1])
        logits = self.logits(codes, is_masked, batch, draws[:, 1] < self.condition_drop)
        loss = F.cross_entropy(logits, codes[is_masked], label_smoothing=self.label_smoothing)
        return loss, (logits.argmax(-1) == codes[is_masked]).float().mean()


class MaskedModelingTask(MaskedTokensTask[LabelledImages]):
    """Training of a MaskGIT on images and their classes; see :class:`MaskedTokensTask`.

    Args:
        transformer: the network to train, from scratch or from loaded weights.
        tokenizer: frozen; turns images into tokens.
        class_drop: share of samples whose class is replaced by the dropped class, for guidance.
        label_smoothing: smoothing of the cross-entropy's targets.
        **optimization: optimiser and schedule, as :class:`~lit_shortcut.tasks.optimized.OptimizedTask` takes them.
    """

    network: MaskGITTransformer

    def __init__(
        self,
        transformer: MaskGITTransformer,
        tokenizer: ImageTokenizer,
        class_drop: float = 0.1,
        label_smoothing: float = 0.1,
        **optimization: Any,
    ) -> None:
        require_share(class_drop=class_drop, label_smoothing=label_smoothing)
        super().__init__(transformer, tokenizer, class_drop, label_smoothing, **optimization)

    def logits(self, codes: Tensor, is_masked: Tensor, batch: LabelledImages, is_dropped: Tensor) -> Tensor:
        """Return logits (M, V) given the batch's classes."""
        classes = self.network.class_ids(batch.labels).masked_fill(is_dropped, self.network.dropped_class_id)
        features = self.network(codes.masked_fill(is_masked, self.network.mask_id), classes)
        return self.network.interface().logits(features)[is_masked]


class PromptedMaskedModelingTask(MaskedTokensTask[CaptionedImages]):
    """Training of a text-to-image base's transformer on images and captions; see :class:`MaskedTokensTask`.

    Args:
        base: its transformer is trained; its tokenizer, which turns images into tokens, stays frozen.
        prompt_drop: share of samples whose caption is replaced by the unconditional prompt, for guidance.
        label_smoothing: smoothing of the cross-entropy's targets.
        **optimization: optimiser and schedule, as :class:`~lit_shortcut.tasks.optimized.OptimizedTask` takes them.

    Raises:
        ValueError: if the base's tokenizer cannot encode images.
    """

    network: LLaDA

    def __init__(
        self,
        base: DiMOO,
        prompt_drop: float = 0.1,
        label_smoothing: float = 0.0,
        **optimization: Any,
    ) -> None:
        if not hasattr(base.tokenizer, "encode"):
            raise ValueError(f"the base's tokenizer must encode images; {type(base.tokenizer).__name__} only decodes")
        tokenizer = cast(ImageTokenizer, base.tokenizer)
        require_share(prompt_drop=prompt_drop, label_smoothing=label_smoothing)
        super().__init__(base.transformer, tokenizer, prompt_drop, label_smoothing, **optimization)
        self.base = base

    def texts(self, prompts: Sequence[str], is_dropped: Tensor) -> list[list[int]]:
        """Return the token ids of ``prompts`` (B,), and those of the unconditional prompt where ``is_dropped`` (B,)."""
        return [
            self.base.unconditional_ids() if dropped else self.base.prompt_ids(prompt)
            for prompt, dropped in zip(prompts, is_dropped.tolist(), strict=True)
        ]

    def logits(self, codes: Tensor, is_masked: Tensor, batch: CaptionedImages, is_dropped: Tensor) -> Tensor:
        """Return logits (M, V) given the batch's captions."""
        context = self.base.context_of([self.texts(batch.prompts, is_dropped)])
        features = self.base.features(codes.masked_fill(is_masked, self.base.spec.mask_id), context, Clock(0, 1))[0]
        first = self.base.special.first_code
        head = self.network.head_weight[first : first + self.base.spec.codebook_size]
        return F.linear(features[:, : codes.shape[1]][is_masked], head)
