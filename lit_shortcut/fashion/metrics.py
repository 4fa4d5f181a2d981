"""Whether generated garments are what their prompts ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_shortcut.contracts import Conditions
from lit_shortcut.fashion.garments import follows, measure, read_prompt
from lit_shortcut.metrics.images import ClassAgreement, ImageMean, prompts_of


class PromptClassAgreement(ClassAgreement):
    """Share of images that a classifier takes for the class their prompt names.

    Args:
        classifier: frozen network from uint8 images (B, 3, H, W) to logits over Fashion-MNIST's classes.
    """

    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Take in uint8 ``images`` (B, 3, H, W); those whose prompt names no class are left out.

        Raises:
            ValueError: if ``conditions`` have no prompts.
        """
        labels = [read_prompt(prompt).label for prompt in prompts_of(conditions)]
        named = torch.tensor([label is not None for label in labels], device=images.device)
        classes = torch.tensor([label for label in labels if label is not None], device=images.device)
        if len(classes):
            super().update(images[named], conditions._replace(labels=classes))


class AttributeAgreement(ImageMean):
    """Share of the attributes asked for in prompts that their images have, by :mod:`lit_shortcut.fashion.garments`."""

    higher_is_better = True

    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Take in uint8 ``images`` (B, 3, H, W); a prompt that names no class, or no attribute, counts for nothing.

        Raises:
            ValueError: if ``conditions`` have no prompts.
        """
        prompts = prompts_of(conditions)
        values = {name: column.tolist() for name, column in measure(images).items()}
        for row, prompt in enumerate(prompts):
            label, attributes = read_prompt(prompt)
            if label is not None and attributes:
                measured = {name: column[row] for name, column in values.items()}
                if kept := follows(measured, label, attributes):
                    self.add(torch.tensor(kept))
