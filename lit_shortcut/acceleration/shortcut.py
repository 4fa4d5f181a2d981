"""The trained shortcut network as a predictor."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lit_shortcut.acceleration.planned import Past, PredictFn
from lit_shortcut.contracts import MaskedImageModel, State
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.weights import WeightsError, fingerprint, load_module_with_metadata


class Shortcut:
    """Next features by a :class:`~lit_shortcut.networks.shortcut.ShortcutNet`, guidance branches in one batch.

    Args:
        network: trained on trajectories of the base it will stand in for.
        base_fingerprint: of that base; None trusts the caller.
    """

    memory = 1

    def __init__(self, network: ShortcutNet, base_fingerprint: str | None = None) -> None:
        self.network, self.base_fingerprint = network, base_fingerprint

    @classmethod
    def load(cls, path: Path) -> Shortcut:
        """The network at ``path``, a checkpoint (``.ckpt``) of fit or a safetensors file, tied to its base.

        Raises:
            WeightsError: if the file is missing, damaged, or holds something else.
        """
        network, metadata = load_module_with_metadata(ShortcutNet, path)
        return cls(network, metadata.get("base_fingerprint"))

    def facts(self) -> dict[str, str | int]:
        """Its name and the fingerprint of its weights."""
        return {"method": "shortcut", "weights": fingerprint(self.network.state_dict())}

    def start(self, base: MaskedImageModel) -> PredictFn:
        """Predict from the latest features and the tokens just committed, embedded by the base's own interface.

        Raises:
            WeightsError: if the network was trained for another base.
        """
        if self.base_fingerprint not in (None, base.fingerprint):
            raise WeightsError(
                f"this shortcut was trained on trajectories of base {self.base_fingerprint}, "
                f"it cannot accelerate base {base.fingerprint}"
            )
        network = self.network.to(base.interface.code_embedding.device)

        def predict(past: Past, state: State) -> Tensor:
            branches = past.latest.shape[0]
            control = base.interface.embed(state.control.tokens, state.control.positions)
            following: Tensor = network(
                past.latest.flatten(0, 1),
                control.repeat(branches, 1, 1),
                state.masked_share.repeat(branches),
            )
            return following.unflatten(0, (branches, -1))

        return predict
