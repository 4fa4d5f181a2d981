from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch

from datamodules.conditions import ClassLabels
from lit_shortcut.acceleration.accelerated import Vanilla
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.callbacks.trajectory_writer import TrajectoryWriter
from lit_shortcut.contracts import Conditions, MaskedImageModel
from lit_shortcut.sampling import Decoding, sample
from lit_shortcut.tasks.recording import RecordingTask, record

DECODING = Decoding(num_steps=5)


@pytest.mark.parametrize("guidance", [0.0, 2.8])
def test_recorded_features_and_tokens_are_those_of_the_decoding_loop(base: MaskedImageModel, guidance: float) -> None:
    conditions = Conditions(torch.arange(3), torch.arange(3) + 5, torch.arange(3))
    decoding = Decoding(num_steps=5, guidance=guidance)
    recorded = record(base, conditions, decoding)
    steps = list(sample(base, conditions, decoding, Vanilla()))
    spec = base.spec
    assert recorded.features.shape == (3, 1 if guidance == 0 else 2, 5, spec.sequence_length, spec.width)
    assert recorded.conditions is conditions
    for index, step in enumerate(steps):
        assert torch.equal(recorded.features[:, :, index], step.features.transpose(0, 1))
        assert torch.equal(recorded.committed_at < index, step.state.tokens != spec.mask_id)
        is_known = recorded.committed_at <= index
        assert torch.equal(recorded.tokens.masked_fill(~is_known, spec.mask_id), step.tokens)


@pytest.mark.parametrize("compiled", [False, True])
def test_recording_is_compiled_where_that_is_asked_for(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bases: list[MaskedImageModel] = []
    monkeypatch.setattr("lit_shortcut.tasks.recording.compile_networks", lambda base, *_: bases.append(base))
    task = RecordingTask(ToyBase(), decoding=DECODING, compiled=compiled)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.predict(task, datamodule=ClassLabels(4, batch_size=4))
    assert bases == [task.base] * compiled


def test_unknown_class_is_refused_before_anything_is_recorded(tmp_path: Path) -> None:
    writer = TrajectoryWriter(tmp_path / "set")
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[writer])
    with pytest.raises(ValueError, match=r"class labels must lie in 0\.\.9; got \[10\]"):
        trainer.predict(RecordingTask(ToyBase(), decoding=Decoding(5)), ClassLabels(11, batch_size=1, num_classes=11))
    assert not list((tmp_path / "set").glob("shard-*"))
