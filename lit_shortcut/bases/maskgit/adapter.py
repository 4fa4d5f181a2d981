"""MaskGIT's answer to the base protocol."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lit_shortcut.bases.class_tokens import ClassContext, class_context
from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.contracts import Clock, Conditions, Context, ImageTokenizer, TokenSpec
from lit_shortcut.weights import WeightsError, fingerprint, network_fingerprint


class MaskGIT(nn.Module):
    """A frozen class-conditional MaskGIT with its image tokenizer.

    Args:
        transformer: the network that is accelerated.
        tokenizer: decodes its tokens to images.

    Raises:
        WeightsError: if the tokenizer has another number of codes than the transformer.
    """

    def __init__(self, transformer: MaskGITTransformer, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        if tokenizer.codebook_size != transformer.codebook_size:
            raise WeightsError(
                f"transformer and tokenizer do not belong together: the one draws {transformer.codebook_size} codes, "
                f"the other has {tokenizer.codebook_size}"
            )
        self.transformer, self.tokenizer = transformer, tokenizer
        self.eval().requires_grad_(False)
        self.interface = transformer.interface()
        self.spec = TokenSpec(
            num_tokens=transformer.num_tokens,
            sequence_length=transformer.num_tokens + 1,
            width=transformer.token_embedding.embedding_dim,
            codebook_size=transformer.codebook_size,
            mask_id=transformer.mask_id,
            num_classes=transformer.num_classes,
        )
        self.fingerprint = fingerprint(transformer.state_dict())

    def train(self, mode: bool = True) -> MaskGIT:
        """Stay in eval mode: a base is frozen."""
        return super().train(False)

    def identity(self) -> dict[str, Any]:
        """Fingerprints of transformer and image tokenizer."""
        return {
            "class": type(self).__name__,
            "fingerprint": self.fingerprint,
            "decoder": network_fingerprint(self.tokenizer),
        }

    def context(self, conditions: Conditions, *, guided: bool) -> Context:
        """Class token ids.

        Raises:
            ValueError: if a label lies outside 0..num_classes-1.
        """
        return class_context(conditions, self.spec.num_classes, self.transformer.first_class_id, guided=guided)

    def features(self, tokens: Tensor, context: Context, clock: Clock) -> Tensor:
        """Features (G, B, L + 1, C), both branches in one batch; the last row belongs to the class token."""
        assert isinstance(context, ClassContext)
        branches = len(context.ids)
        stacked: Tensor = self.transformer(tokens.repeat(branches, 1), context.ids.flatten())
        return stacked.unflatten(0, (branches, -1))

    def decode(self, tokens: Tensor) -> Tensor:
        """Images, uint8 (B, 3, H, W), of codes ``tokens`` (B, L)."""
        return self.tokenizer.decode(tokens)
