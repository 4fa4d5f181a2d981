"""MaskGIT and other class-conditional bases behind the base protocol."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lit_shortcut.bases.class_tokens import ClassContext, class_context
from lit_shortcut.bases.frozen import FrozenBase
from lit_shortcut.contracts import Clock, Conditions, Context, ImageDecoder, TokenSpec
from lit_shortcut.interface import TokenInterface
from lit_shortcut.weights import WeightsError, fingerprint


class ClassTransformer(Protocol):
    """A network from image tokens and a class to features.

    Class k has the id ``first_class_id`` + k, the dropped class the id after the last; ``sequence_length`` is S.
    """

    num_tokens: int
    sequence_length: int
    width: int
    codebook_size: int
    mask_id: int
    num_classes: int
    first_class_id: int

    def __call__(self, tokens: Tensor, class_ids: Tensor) -> Tensor:
        """Features (B, S, C) of image ``tokens`` (B, L) under ``class_ids`` (B,)."""

    def interface(self) -> TokenInterface:
        """The cheap ends, sharing the network's parameters."""

    def state_dict(self) -> dict[str, Tensor]:
        """Weights of the network."""


class CountedDecoder(ImageDecoder, Protocol):
    """An image decoder that knows the number of its codes."""

    @property
    def codebook_size(self) -> int:
        """V, number of codes."""


class MaskGIT(FrozenBase):
    """A frozen class-conditional MaskGIT with its image decoder.

    Args:
        transformer: the network that is accelerated.
        tokenizer: decodes its tokens to images.

    Raises:
        WeightsError: if the tokenizer has another number of codes than the transformer.
    """

    def __init__(self, transformer: ClassTransformer, tokenizer: CountedDecoder) -> None:
        if tokenizer.codebook_size != transformer.codebook_size:
            raise WeightsError(
                f"transformer and tokenizer do not belong together: the one draws {transformer.codebook_size} codes, "
                f"the other has {tokenizer.codebook_size}"
            )
        super().__init__(transformer, tokenizer)
        self.interface = transformer.interface()
        self.spec = TokenSpec(
            num_tokens=transformer.num_tokens,
            sequence_length=transformer.sequence_length,
            width=transformer.width,
            codebook_size=transformer.codebook_size,
            mask_id=transformer.mask_id,
            num_classes=transformer.num_classes,
        )
        self.weights_fingerprint = fingerprint(self.weights())  # now, before a trainer casts the weights

    def context(self, conditions: Conditions, *, guided: bool) -> Context:
        """Class token ids.

        Raises:
            ValueError: if a label lies outside 0..num_classes-1.
        """
        return class_context(conditions, self.spec.num_classes, self.transformer.first_class_id, guided=guided)

    def features(self, tokens: Tensor, context: Context, clock: Clock) -> Tensor:
        """Features (G, B, S, C), both branches in one batch."""
        assert isinstance(context, ClassContext)
        branches = len(context.ids)
        stacked: Tensor = self.transformer(tokens.repeat(branches, 1), context.ids.flatten())
        return stacked.unflatten(0, (branches, -1))
