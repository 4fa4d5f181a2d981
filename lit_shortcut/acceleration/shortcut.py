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
from lit_shortcut.networks.control import Layout, advance, lay_out_branches, require_kind
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.networks.shortcut import ShortcutNet, ShortcutNetwork
from lit_shortcut.weights import WeightsError, fingerprint, load_module_with_metadata

Precision = Literal["bfloat16", "float16", "float32"]


class Shortcut(nn.Module):
    """Next features by a shortcut network.

    Guidance branches run in one batch, or one after the other where their prompts differ in length. An anchored network
    starts from the last full step and all tokens committed since, any other from the latest features.

    Args:
        network: trained on trajectories of the base it will stand in for.
        base_fingerprint: of that base; None trusts the caller.
        dtype: of the network's weights and arithmetic; None leaves them as they are.
    """

    def __init__(
        self, network: ShortcutNetwork, base_fingerprint: str | None = None, dtype: Precision | None = None
    ) -> None:
        super().__init__()
        self.network, self.base_fingerprint = network, base_fingerprint
        if dtype is not None:
            self.network.to(getattr(torch, dtype))

    @property
    def memory(self) -> int:
        """1 for an anchored network, else 0."""
        return int(self.network.options.anchored)

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
        """Predict from features and the tokens committed since, embedded by the base's own interface.

        Raises:
            WeightsError: if the network was trained for another base, or does not fit this one.
        """
        self._require_fit(base)
        interface, network = base.interface, self.network
        if (weight := next(network.parameters())).device != interface.code_embedding.device:
            network.to(interface.code_embedding.device)
        dtype, anchored = weight.dtype, network.options.anchored
        layouts = lay_out_branches(network, interface, context)
        since: list[Control] = []  # an anchored network's control, step by step
        anchor = -1

        def source(past: Past, state: State) -> tuple[Tensor, Control, Tensor | None]:
            nonlocal anchor
            if not anchored:
                return past.latest, state.control, None
            step, features = past.full[-1]
            if step != anchor:
                anchor = step
                since.clear()
            since.append(state.control)
            tokens, positions = (torch.cat(parts, dim=1) for parts in list(zip(*since, strict=True))[:2])
            return features, Control(tokens, positions), torch.full_like(state.masked_share, state.clock.step - step)

        def following(
            features: Tensor, control: Control, state: State, gap: Tensor | None, layout: Layout | None
        ) -> Tensor:
            share, masked = state.masked_share, state.masked
            predicted = advance(network, interface, features.to(dtype), control, share, layout, masked=masked, gap=gap)
            return predicted.to(features.dtype)

        def predict(past: Past, state: State) -> Tensor:
            features, control, gap = source(past, state)
            branches, num_rows = features.shape[0], features.shape[-2]
            if not layouts:
                control = Control(control.tokens.repeat(branches, 1), control.positions.repeat(branches, 1))
                share, masked = state.masked_share.repeat(branches), state.masked.repeat(branches, 1)
                repeated = state._replace(masked_share=share, masked=masked)
                gap = None if gap is None else gap.repeat(branches)
                return following(features.flatten(0, 1), control, repeated, gap, None).unflatten(0, (branches, -1))
            predicted = []
            for rows, layout in zip(features, layouts, strict=True):
                own = following(rows[:, : layout.rows.shape[1]], control, state, gap, layout)
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
