"""``torch.compile`` where the time goes: the base's pass and the predictors' networks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lit_shortcut.contracts import MaskedImageModel
from lit_shortcut.networks.shortcut import ShortcutNetwork


def compile_networks(base: MaskedImageModel, methods: Iterable[nn.Module]) -> None:
    """Compile ``base.features`` and every shortcut network among ``methods``, in place.

    Weights, their names and fingerprints stay as they are. The first images take as long as the compiler does; the
    number of control tokens changes from step to step and is compiled as a variable.
    """
    base.features = torch.compile(base.features)  # type: ignore[method-assign]
    for method in methods:
        for module in method.modules():
            if isinstance(module, ShortcutNetwork):
                module.compile()
