"""Recording of trajectories: ``predict`` runs the vanilla loop and keeps the features of every step."""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torch.utils.data import DataLoader

from lit_shortcut.acceleration.accelerated import Vanilla
from lit_shortcut.acceleration.compilation import Mode, compile_networks
from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import Acceleration, Conditions, MaskedImageModel, Trajectories
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.evaluation.drawing import require_known
from lit_shortcut.sampling import Decoding, sample
from lit_shortcut.tasks.room import HostRoom, Room, room_of
from lit_shortcut.trajectory import FORMAT_VERSION, Card
from lit_shortcut.trajectory.interface_file import interface_fingerprint

SCRATCH = Path("runs/scratch")


class Asked(Protocol):
    """Data module of the conditions of a set's images."""

    num_images: int
    batch_size: int
    seed: int
    num_classes: int
    prompts_sha256: str

    def loader(self) -> DataLoader[Conditions]:
        """Batches of conditions."""


class RecordingTask(L.LightningModule):
    """Trajectories of a frozen base, batch by batch; nothing is trained.

    Args:
        base: the frozen model.
        decoding: how tokens are drawn.
        compiled: run the base through ``torch.compile``.
        compile_mode: ``reduce-overhead`` replays CUDA graphs.
        memory_limit_gb: features of a batch that are kept in the host's memory, in GB (10⁹ bytes); each batch that
            waits to be written takes as much. Where a batch's take more, they go to a file step by step, and no
            trajectory lies in memory whole. A GPU keeps those of three steps at most, see
            :class:`~lit_shortcut.tasks.room.HostRing`.
        scratch: folder of such files, on a disk and not in memory (tmpfs); they leave nothing behind.

    Raises:
        ValueError: if ``memory_limit_gb`` is negative.
    """

    def __init__(
        self,
        base: MaskedImageModel,
        *,
        decoding: Decoding | None = None,
        compiled: bool = False,
        compile_mode: Mode = "default",
        memory_limit_gb: float = 8.0,
        scratch: Path = SCRATCH,
    ) -> None:
        super().__init__()
        require_at_least(0, memory_limit_gb=memory_limit_gb)
        assert isinstance(base, nn.Module)
        self.base: MaskedImageModel = base
        self.decoding, self.compiled, self.compile_mode = decoding or Decoding(), compiled, compile_mode
        self.memory_limit_gb, self.scratch = memory_limit_gb, Path(scratch)

    def setup(self, stage: str) -> None:
        """Check up front that everything can be recorded.

        Raises:
            ValueError: if the base does not know a condition, or the schedule cannot spend the tokens in so many steps.
        """
        tokens_per_step(self.decoding.schedule, self.decoding.num_steps, self.base.spec.num_tokens)
        if (datamodule := getattr(self.trainer, "datamodule", None)) is not None:
            require_known(self.base, datamodule, guided=self.decoding.is_guided)

    def on_predict_start(self) -> None:
        """Compile networks if ``compiled``, and make room for features."""
        if self.compiled:
            compile_networks(self.base, (), self.compile_mode)
        self.room: HostRoom = room_of(self.device, self.memory_limit_gb, self.scratch)

    def predict_step(self, batch: Conditions, batch_idx: int) -> Future[Trajectories]:
        """Return the future of one batch's trajectories in the host's memory, all features kept."""
        return self.room.finished(record(self.base, batch, self.decoding, self.room))

    def on_predict_end(self) -> None:
        """Wait until all features have left the device."""
        self.room.close()


_ON_DEVICE, _VANILLA = Room(), Vanilla()


def record(
    base: MaskedImageModel,
    conditions: Conditions,
    decoding: Decoding,
    room: Room = _ON_DEVICE,
    method: Acceleration = _VANILLA,
) -> Trajectories:
    """Run the decoding loop and keep the base's features of every step as soon as they are computed.

    Args:
        base: the frozen model.
        conditions: what to generate, in one batch.
        decoding: how tokens are drawn.
        room: storage of the features, in which each step's are contiguous.
        method: what computes the features that tokens are drawn from; the base also runs at steps that this skips.
    """
    features, tokens = None, conditions.ids
    context = base.context(conditions, guided=decoding.is_guided)
    committed_at = torch.empty(len(conditions.ids), base.spec.num_tokens, dtype=torch.long, device=tokens.device)
    for step in sample(base, conditions, decoding, method, context):
        computed = step.features
        if step.is_full is not True:
            with torch.inference_mode():
                computed = base.features(step.state.tokens, context, step.state.clock)
        if features is None:
            features = room.make(computed, (decoding.num_steps, *computed.shape))
        room.put(features[step.state.clock.step], computed)
        tokens = step.tokens
        committed_at.scatter_(1, step.committed.positions, step.state.clock.step)
    assert features is not None
    prefix = context.prefix and context.prefix.map(lambda part: part.transpose(0, 1))  # (G, B, …) to (B, G, …)
    return Trajectories(conditions, features.permute(2, 1, 0, 3, 4), tokens, committed_at, prefix)


def card_of(
    base: MaskedImageModel,
    decoding: Decoding,
    asked: Asked,
    *,
    encoding: str,
    precision: str,
    base_identity: dict[str, Any],
) -> Card:
    """Return the card of the set that :func:`record` makes of the images ``asked``, with a shard for each batch.

    Args:
        base: the frozen model.
        decoding: how tokens are drawn.
        asked: conditions of the images.
        encoding: encoding of the features as stored.
        precision: the trainer's precision.
        base_identity: identity of the base, as JSON; with its ``fingerprint``.
    """
    first = move_data_to_device(asked.loader().dataset[0].slice(0, 1), base.interface.code_embedding.device)
    return Card(
        format_version=FORMAT_VERSION,
        base=json.loads(json.dumps(base_identity)),
        interface=interface_fingerprint(base.interface),
        spec=base.spec._asdict(),
        decoding=asdict(decoding),
        branches=decoding.branches,
        num_steps=decoding.num_steps,
        precision=precision,
        encoding=encoding,
        text_rows=base.context(first, guided=decoding.is_guided).prefix is not None,
        num_samples=asked.num_images,
        samples_per_shard=asked.batch_size,
        seed=asked.seed,
        num_classes=asked.num_classes,
        prompts=asked.prompts_sha256,
    )
