"""The trained shortcut network as a predictor."""

from __future__ import annotations

from torch import Tensor

from lit_shortcut.acceleration.planned import Past, PredictFn
from lit_shortcut.contracts import MaskedImageModel, State
from lit_shortcut.networks.shortcut import ShortcutNet


class Shortcut:
    """Next features by a :class:`~lit_shortcut.networks.shortcut.ShortcutNet`, guidance branches in one batch.

    Args:
        network: trained on trajectories of the base it will stand in for.
    """

    memory = 1

    def __init__(self, network: ShortcutNet) -> None:
        self.network = network

    def start(self, base: MaskedImageModel) -> PredictFn:
        """Predict from the latest features and the tokens just committed, embedded by the base's own interface."""

        def predict(past: Past, state: State) -> Tensor:
            branches = past.latest.shape[0]
            control = base.interface.embed(state.control.tokens, state.control.positions)
            following: Tensor = self.network(
                past.latest.flatten(0, 1),
                control.repeat(branches, 1, 1),
                state.masked_share.repeat(branches),
            )
            return following.unflatten(0, (branches, -1))

        return predict
