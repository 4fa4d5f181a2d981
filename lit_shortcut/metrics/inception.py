"""The Inception network that defines FID, as a feature extractor."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from lit_shortcut.inputs import located
from lit_shortcut.weights import WeightsError

Feature = Literal["64", "192", "768", "2048", "logits_unbiased"]


class InceptionFeatures(nn.Module):
    """torch-fidelity's ``inception-v3-compat``, equal to the network of the original FID, frozen.

    Images are resized to 299×299 as TensorFlow 1 did, without antialiasing: the reference definition.

    Args:
        weights: torch-fidelity's weight file. None downloads it into torch's hub cache, unless it is there.
        feature: layer whose pooled output is returned, named by its width; FID, KID, precision and recall are defined
            on 2048, the Inception Score on ``logits_unbiased``.

    Raises:
        WeightsError: if the weights are unavailable or do not fit; the message says how to get them.
    """

    def __init__(self, weights: Path | None = None, feature: Feature = "2048") -> None:
        super().__init__()
        self.hparams = {"feature": feature}
        self.num_features = 1008 if feature == "logits_unbiased" else int(feature)
        # torch-fidelity unpickles any file: give it a copy of tensors that were read safely
        copy = io.BytesIO()
        torch.save(_download() if weights is None else _read(weights), copy)
        copy.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", [feature], copy)
        except RuntimeError as error:
            raise WeightsError(f"{weights or URL_INCEPTION_V3}: not Inception's weights. {_ADVICE}") from error

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, num_features) of uint8 ``images`` (B, 1 or 3, H, W); grey is repeated to 3 channels."""
        features: Tensor = self.network(images.expand(-1, 3, -1, -1))[0]
        return features


_ADVICE = (
    f"FID needs the file {Path(URL_INCEPTION_V3).name} of torch-fidelity's release v0.2.0: download it from "
    f"{URL_INCEPTION_V3} and give its path as `weights`, or put it into the folder `checkpoints` of torch's hub cache "
    "(TORCH_HOME/hub, by default ~/.cache/torch/hub), where it is found without an argument."
)


def _download() -> dict[str, Tensor]:
    try:
        state = torch.hub.load_state_dict_from_url(
            URL_INCEPTION_V3, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{URL_INCEPTION_V3}: no download ({error}). {_ADVICE}") from error
    return dict(state)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(located(path), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path}: not a readable weight file ({type(error).__name__}). {_ADVICE}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: expected a plain state dict. {_ADVICE}")
    return state
