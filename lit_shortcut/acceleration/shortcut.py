"""The trained shortcut network as a predictor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from torch import Tensor, nn
from torch.nn.functional import pad

from lit_shortcut.acceleration.accelerated import Accelerated, Past, PredictFn
from lit_shortcut.acceleration.card import model_card
from lit_shortcut.acceleration.origin import (
    CARD,
    CONFIG,
    PLAN,
    WEIGHTS,
    BaseReference,
    Origin,
    read_config,
    write_config,
)
from lit_shortcut.contracts import BaseEnds, Context, Control, State
from lit_shortcut.guidance import guide_rows
from lit_shortcut.hub import local_file
from lit_shortcut.inputs import located
from lit_shortcut.networks.control import Layout, advance, joined_masks, lay_out_branches, require_kind
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.networks.shortcut import ShortcutNet, ShortcutNetwork
from lit_shortcut.weights import (
    Precision,
    WeightsError,
    build_module,
    fingerprint,
    first_sentence,
    load_module_with_metadata,
    load_tensors,
    save_module,
    save_tensors,
)
from lit_shortcut.weights import identity as network_identity

NETWORKS = (ShortcutNet, LLaDAShortcutNet)


class Shortcut(nn.Module, ModelHubMixin, library_name="lit-shortcut", tags=["migm-shortcut"]):
    """Prediction of the next features by a shortcut network.

    A folder or repository of the Hugging Face hub holds ``model.safetensors``, ``config.json``, a model card and, with
    calibrated plans, ``plan.json``; ``from_pretrained`` and the like come from ``huggingface_hub``.
    Guidance branches run in one batch, or one after the other if they have text prefixes; a guided network runs once,
    and both branches are what it predicts, which guidance leaves as it is. An anchored network starts from the last
    full step and all tokens committed since, others from the latest features.

    Args:
        network: network trained on trajectories of the base.
        base_fingerprint: fingerprint of that base; None trusts the caller.
        dtype: dtype of the network's weights and arithmetic; None keeps the present one.
        origin: origin of the network; None knows only the base's fingerprint.
        weights: fingerprint of the network as it was read, to which calibrated plans refer in any precision.
    """

    def __init__(
        self,
        network: ShortcutNetwork,
        base_fingerprint: str | None = None,
        dtype: Precision | None = None,
        origin: Origin | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.network, self.base_fingerprint = network, base_fingerprint
        self.origin = origin or Origin(BaseReference(base_fingerprint or ""))
        self._weights = weights
        self.folder: Path | None = None  # that it was read from; its card, plan and pictures are saved along with it
        if dtype is not None:
            self.network.to(getattr(torch, dtype))

    @property
    def memory(self) -> int:
        """1 for an anchored network, else 0."""
        return int(self.network.options.anchored)

    @classmethod
    def load(cls, path: Path, dtype: Precision | None = None) -> Shortcut:
        """Load a checkpoint (``.ckpt``) of fit, a safetensors file, or the folder of a shortcut, tied to its base.

        Args:
            path: path of the file or folder.
            dtype: dtype to run in; None takes float32, whatever the file's.

        Raises:
            WeightsError: if the file is missing, damaged, or not a shortcut.
        """
        path = located(path)
        if path.is_dir():
            return cls.from_pretrained(path, dtype=dtype)
        network, metadata = load_module_with_metadata(NETWORKS, path)
        origin = Origin.of_metadata(metadata)
        return cls(network, origin.base.fingerprint or None, dtype, origin, fingerprint(network.state_dict()))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **model_kwargs: Any,
    ) -> Shortcut:
        """Load the folder of a shortcut, or a repository of the hub.

        Args:
            pretrained_model_name_or_path: a folder, ``owner/repository``, ``hf://owner/repository`` or
                ``hf://owner/repository@revision``.
            force_download: download again even if the cache has it.
            token: token of a private repository.
            cache_dir: folder of the downloads.
            local_files_only: download nothing.
            revision: branch, tag or commit.
            model_kwargs: ``dtype`` to run in; None takes float32, whatever the file's.

        Raises:
            WeightsError: if it is unavailable, damaged, or not a shortcut.
        """
        source = str(pretrained_model_name_or_path)
        name, _, at = source.removeprefix("hf://").partition("@") if source.startswith("hf://") else (source, "", "")
        if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
            raise WeightsError(f"{source}: no such folder, and no repository of the hub (owner/repository)")
        if Path(name).is_dir():
            read_config(Path(name))  # raises an error that names a damaged file
        try:
            return super().from_pretrained(
                name,
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                revision=revision or at or None,
                **model_kwargs,
            )
        except WeightsError:
            raise
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"{source}: no folder here, not in the hub's cache and not to be downloaded "
                f"({first_sentence(error)}). Where there is a network run `hf download {name} --local-dir FOLDER`, and "
                "give FOLDER in place of the address"
            ) from error

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: Any,
    ) -> Shortcut:
        model_kwargs.pop("network", None)  # config.json's, which the mixin takes for an argument of the constructor
        folder = Path(model_id)
        if not folder.is_dir():
            wanted = [CONFIG, WEIGHTS, PLAN, CARD, "*.png"]
            options: dict[str, Any] = {"force_download": force_download, "local_files_only": local_files_only}
            options |= {"revision": revision, "cache_dir": cache_dir, "token": token}
            folder = Path(snapshot_download(model_id, allow_patterns=wanted, **options))
        found, origin = read_config(folder)
        tensors, _ = load_tensors(folder / WEIGHTS)
        network = build_module(NETWORKS, found, tensors, folder / CONFIG)
        weights = fingerprint(network.state_dict())
        identity: Any = {"base_fingerprint": origin.base.fingerprint or None, "weights": weights}
        shortcut = cls(network, origin=origin, **identity, **model_kwargs)
        shortcut.folder = folder
        return shortcut

    def _save_pretrained(self, save_directory: Path) -> None:
        as_read, identity = self._as_read(), network_identity(self.network)
        facts = {"num_steps": self.origin.num_steps, "decoding": dict(self.origin.decoding)}  # of the file by itself
        facts |= {"base_fingerprint": self.base_fingerprint}
        if as_read:
            save_tensors(save_directory / WEIGHTS, as_read, identity | facts)
        else:
            save_module(save_directory / WEIGHTS, self.network, facts)
        write_config(save_directory, identity, self.origin)
        if self.folder is None or self.folder.resolve() == save_directory.resolve():
            return
        kept = [self.folder / CARD, *self.folder.glob("*.png")]
        kept += [self.folder / PLAN] if as_read else []  # a calibrated plan is for these weights only
        for path in kept:
            if path.exists():
                shutil.copyfile(path, save_directory / path.name)

    def _as_read(self) -> dict[str, Tensor]:
        """Return the weights of the folder they were read from, if they only run in another dtype now; else none."""
        if self.folder is None or not (self.folder / WEIGHTS).exists():
            return {}
        stored, _ = load_tensors(self.folder / WEIGHTS)
        own = self.network.state_dict()
        is_equal = stored.keys() == own.keys() and all(
            torch.equal(stored[name].to(tensor.dtype), tensor.cpu()) for name, tensor in own.items()
        )
        return stored if is_equal else {}

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the model card, without measurements; :func:`~lit_shortcut.acceleration.card.write_card` adds them."""
        return ModelCard(model_card(self.origin, network_identity(self.network)))

    @classmethod
    def load_published(cls, path: str, num_heads: int = 16) -> Shortcut:
        """Load a released MIGM-Shortcut network, whose file does not name its base.

        Args:
            path: path or ``hf://`` address of its state dict.
            num_heads: attention heads, which the file does not show.

        Raises:
            WeightsError: if the file is unavailable, damaged, or not a MIGM-Shortcut.
        """
        network = ShortcutNet.load_published(local_file(path), num_heads)
        return cls(network, weights=fingerprint(network.state_dict()))

    def identity(self) -> dict[str, Any]:
        """Name, and the fingerprint of the weights."""
        return {"method": "shortcut", "weights": self._weights or fingerprint(self.network.state_dict())}

    def start(self, base: BaseEnds, context: Context) -> PredictFn:
        """Predict from features and the tokens committed since, embedded by the base's own interface.

        Raises:
            WeightsError: if the network was trained for another base, or does not fit this one.
        """
        self.require_fit(base)
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
            return features, _joined(since), torch.full_like(state.masked_share, state.clock.step - step)

        def following(
            features: Tensor, control: Control, state: State, gap: Tensor | None, layout: Layout | None
        ) -> Tensor:
            share, masked = state.masked_share, state.masked
            predicted = advance(network, interface, features.to(dtype), control, share, layout, masked=masked, gap=gap)
            return predicted.to(features.dtype)

        def predict(past: Past, state: State) -> Tensor:
            features, control, gap = source(past, state)
            branches, num_rows = features.shape[0], features.shape[-2]
            if network.options.guided:
                features = guide_rows(features, state.guidance, interface.num_rows)[None]
            passes = len(features)
            if layouts:
                predicted = []
                for rows, layout in zip(features, layouts[:passes], strict=True):
                    own = following(rows[:, : layout.rows.shape[1]], control, state, gap, layout)
                    predicted.append(pad(own, (0, 0, 0, num_rows - own.shape[1])))
                return torch.stack(predicted).expand(branches, -1, -1, -1)
            if passes > 1:
                control = _repeated(control, passes)
                share, masked = state.masked_share.repeat(passes), state.masked.repeat(passes, 1)
                state = state._replace(masked_share=share, masked=masked)
                gap = None if gap is None else gap.repeat(passes)
            together = following(features.flatten(0, 1), control, state, gap, None)
            return together.unflatten(0, (passes, -1)).expand(branches, -1, -1, -1)

        return predict

    def require_fit(self, base: BaseEnds) -> None:
        """Check that it fits ``base``; raises WeightsError if not."""
        # a base may read all its weights for its fingerprint, so it is only computed for a comparison
        if self.base_fingerprint is not None:
            self.require_base(base.fingerprint)
        require_kind(self.network, base, type(base).__name__)
        if (width := self.network.hparams["width"]) != base.spec.width:
            raise WeightsError(
                f"width: expected {base.spec.width}, that of the base's features, found a shortcut network of {width}"
            )

    def require_base(self, fingerprint: str) -> None:
        """Check that it was trained for the base of ``fingerprint``; raises WeightsError if not."""
        if self.base_fingerprint not in (None, fingerprint):
            at = self.origin.base.revision
            raise WeightsError(
                f"this shortcut was trained on trajectories of base {self.base_fingerprint}"
                f"{f' (revision {at})' * bool(at)}, it cannot accelerate base {fingerprint}"
            )


def shortcut_of(method: object) -> Shortcut | None:
    """Return the trained shortcut that ``method``, a way to decode, predicts with; None if it has none."""
    predictor = method.predictor if isinstance(method, Accelerated) else None
    return predictor if isinstance(predictor, Shortcut) else None


def _repeated(control: Control, times: int) -> Control:
    """Repeat ``control`` of B samples for ``times`` guidance branches."""
    is_real = None if control.is_real is None else control.is_real.repeat(times, 1)
    return Control(control.tokens.repeat(times, 1), control.positions.repeat(times, 1), is_real)


def _joined(controls: list[Control]) -> Control:
    """Concatenate the tokens of several steps, with a mask if any has padding."""
    tokens, positions = (torch.cat(parts, dim=1) for parts in list(zip(*controls, strict=True))[:2])
    return Control(tokens, positions, joined_masks([(one.tokens, one.is_real) for one in controls]))
