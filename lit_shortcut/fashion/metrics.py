"""Metrics of how well generated garments follow their prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_shortcut.contracts import Conditions, require_prompts
from lit_shortcut.fashion.garments import follows, measure, read_prompt
from lit_shortcut.metrics.images import ClassAgreement, ImageMean


class PromptClassAgreement(ClassAgreement):
    """Share of images that a classifier assigns to the class their prompt names.

    Args:
        classifier: frozen network from uint8 images (B, 3, H, W) to logits over Fashion-MNIST's classes.
    """

    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Add uint8 ``images`` (B, 3, H, W); those whose prompt names no class are skipped.

        Raises:
            ValueError: if ``conditions`` have no prompts.
        """
        labels = [read_prompt(prompt).label for prompt in require_prompts(conditions)]
        named = torch.tensor([label is not None for label in labels], device=images.device)
        classes = torch.tensor([label for label in labels if label is not None], device=images.device)
        if len(classes):
            super().update(images[named], conditions._replace(labels=classes))


class AttributeAgreement(ImageMean):
    """Share of the attributes in prompts that their images have, by :mod:`lit_shortcut.fashion.garments`."""

    higher_is_better = True

    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Add uint8 ``images`` (B, 3, H, W); those whose prompt names no class, or no attribute, are skipped.

        Raises:
            ValueError: if ``conditions`` have no prompts.
        """
        values = {name: column.tolist() for name, column in measure(images).items()}
        for row, prompt in enumerate(require_prompts(conditions)):
            label, attributes = read_prompt(prompt)
            if label is not None and attributes:
                measured = {name: column[row] for name, column in values.items()}
                self.add(torch.tensor(follows(measured, label, attributes)))
