"""The trained shortcut network as a predictor."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lit_shortcut.acceleration.accelerated import Past, PredictFn
from lit_shortcut.contracts import BaseEnds, Context, Control, State
from lit_shortcut.hub import local_file
from lit_shortcut.networks.control import Layout, embed_control, lay_out_branches, require_kind
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.networks.shortcut import ShortcutNet, VelocityNet
from lit_shortcut.weights import WeightsError, fingerprint, load_module_with_metadata

Precision = Literal["bfloat16", "float16", "float32"]


class Shortcut(nn.Module):
    """Next features by a shortcut network.

    Guidance branches run in one batch, or one after the other where their prompts differ in length.

    Args:
        network: trained on trajectories of the base it will stand in for.
        base_fingerprint: of that base; None trusts the caller.
        dtype: of the network's weights and arithmetic; None leaves them as they are.
    """

    memory = 0

    def __init__(
        self, network: VelocityNet, base_fingerprint: str | None = None, dtype: Precision | None = None
    ) -> None:
        super().__init__()
        self.network, self.base_fingerprint = network, base_fingerprint
        if dtype is not None:
            self.network.to(getattr(torch, dtype))

    @classmethod
    def load(cls, path: Path, dtype: Precision | None = None) -> Shortcut:
        """The network at ``path``, a checkpoint (``.ckpt``) of fit or a safetensors file, tied to its base.

        Args:
            path: of the file.
            dtype: to run it in; None takes that of the file.

        Raises:
            WeightsError: if the file is missing, damaged, or holds something else.
        """
        network, metadata = load_module_with_metadata((ShortcutNet, LLaDAShortcutNet), path)
        return cls(network, metadata.get("base_fingerprint"), dtype)

    @classmethod
    def load_published(cls, path: str, num_heads: int = 16) -> Shortcut:
        """A released MIGM-Shortcut network; its file does not say which base it is for.

        Args:
            path: of its state dict, or its ``hf://`` address.
            num_heads: attention heads, which the file does not tell.

        Raises:
            WeightsError: if the file cannot be had, is damaged, or holds something else.
        """
        return cls(ShortcutNet.load_published(local_file(path), num_heads))

    def identity(self) -> dict[str, Any]:
        """Its name and the fingerprint of its weights."""
        return {"method": "shortcut", "weights": fingerprint(self.network.state_dict())}

    def start(self, base: BaseEnds, context: Context) -> PredictFn:
        """Predict from the latest features and the tokens just committed, embedded by the base's own interface.

        Raises:
            WeightsError: if the network was trained for another base, or does not fit this one.
        """
        self._require_fit(base)
        interface, network = base.interface, self.network
        if (weight := next(network.parameters())).device != interface.code_embedding.device:
            network.to(interface.code_embedding.device)
        dtype = weight.dtype

        layouts = [] if context.prefix is None else lay_out_branches(interface, context)

        def following(features: Tensor, control: Control, masked_share: Tensor, layout: Layout | None) -> Tensor:
            embedded = embed_control(interface, control, layout)
            predicted: Tensor = network(
                features.to(dtype), embedded.tokens.to(dtype), masked_share, embedded.is_real, embedded.places
            )
            return predicted.to(features.dtype)

        def predict(past: Past, state: State) -> Tensor:
            branches, num_rows = past.latest.shape[0], past.latest.shape[-2]
            if not layouts:
                control = Control(state.control.tokens.repeat(branches, 1), state.control.positions.repeat(branches, 1))
                doubled = following(past.latest.flatten(0, 1), control, state.masked_share.repeat(branches), None)
                return doubled.unflatten(0, (branches, -1))
            predicted = []
            for features, layout in zip(past.latest, layouts, strict=True):
                own_rows = features[:, : layout.rows.shape[1]]
                own = following(own_rows, state.control, state.masked_share, layout)
                predicted.append(pad(own, (0, 0, 0, num_rows - own.shape[1])))
            return torch.stack(predicted)

        return predict

    def _require_fit(self, base: BaseEnds) -> None:
        # a base may have to read all its weights for its fingerprint: ask only where there is one to compare with
        if self.base_fingerprint is not None and self.base_fingerprint != base.fingerprint:
            raise WeightsError(
                f"this shortcut was trained on trajectories of base {self.base_fingerprint}, "
                f"it cannot accelerate base {base.fingerprint}"
            )
        require_kind(self.network, base.interface, type(base).__name__)
        if (width := self.network.hparams["width"]) != base.spec.width:
            raise WeightsError(
                f"the base's features are {base.spec.width} wide, but the shortcut network was built for width {width}"
            )
