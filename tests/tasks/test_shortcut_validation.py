from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.acceleration.replay import Replay
from lit_shortcut.contracts import Trajectories
from lit_shortcut.guidance import guide_rows
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.trajectory import read_shard
from lit_shortcut.trajectory.transitions import concatenated
from tests.tasks.shortcut_runs import QUIET, network, validate
from tests.tiny_trajectories import card, interface, trajectories, transitions, write_set


def by_hand(folder: Path, made: ShortcutNet, depth: int) -> tuple[float, float]:
    """Mean squared error after ``depth`` predictions and that of hold, window by window over the last two shards."""
    found, ends, errors, held = card(), interface(), [], []
    windows = transitions(concatenated([one for shard in (2, 3) for one in read_shard(folder, shard, found)]), depth)
    for row in range(len(windows.step)):
        features = windows.features[row : row + 1]
        for offset in range(depth):
            is_real = windows.control.is_real[row, offset]  # type: ignore[index]
            tokens, positions = (part[row : row + 1, offset, is_real] for part in windows.control[:2])  # type: ignore[index]
            features = made(features, ends.embed(tokens, positions), windows.masked_share[row : row + 1, offset])
        masked, target = windows.is_masked[row, -1], windows.targets[row, -1]
        errors.append((features[0] - target)[:9][masked])
        held.append((windows.features[row] - target)[:9][masked])
    return torch.cat(errors).square().mean().item(), torch.cat(held).square().mean().item()


@pytest.mark.parametrize("validation_batch_size", [1, 2, 8])
def test_validation_equals_a_loop_over_all_transitions(folder: Path, validation_batch_size: int) -> None:
    made = network(1)
    logged = validate(folder, ShortcutTask(made), validation_batch_size=validation_batch_size)
    with torch.no_grad():
        expected = {depth: by_hand(folder, made, depth) for depth in (1, 2, 3)}
    assert logged["val/mse"] == pytest.approx(expected[1][0], rel=1e-5)
    assert logged["val/mse_hold"] == pytest.approx(expected[1][1], rel=1e-5)
    assert logged["val/gain"] == pytest.approx(1 - expected[1][0] / expected[1][1], rel=1e-4)
    for depth in (2, 3):
        error, hold = expected[depth]
        assert logged[f"val/rollout_mse_{depth}"] == pytest.approx(error, rel=1e-5)
        assert logged[f"val/rollout_gain_{depth}"] == pytest.approx(1 - error / hold, rel=1e-4)
    assert "val/rollout_mse_4" not in logged  # 4 steps have 3 transitions


def test_untrained_network_gains_exactly_nothing_at_any_depth(folder: Path) -> None:
    logged = validate(folder, ShortcutTask(network()))
    gains = {name: value for name, value in logged.items() if "gain" in name}
    assert {
        "val/gain",
        "val/rollout_gain_2",
        "val/rollout_gain_3",
        "val/cosine_gain",
        "val/head_kl_gain",
    } <= gains.keys()
    assert set(gains.values()) == {0.0}
    assert logged["val/mse"] == logged["val/mse_hold"]
    assert logged["val/token_agreement"] == logged["val/token_agreement_hold"] < 1


def test_perfect_predictions_reach_the_upper_end_of_every_measure(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, shown = network(), deque[Tensor]()

    class Oracle(ShortcutTask):
        """Shows the network the recorded features of the steps to come, for each depth in turn."""

        def validation_step(self, batch: Trajectories, batch_idx: int) -> None:
            for step in range(1, batch.features.shape[2]):
                shown.extend([batch.features[:, :, step].transpose(0, 1).flatten(0, 1)] * step)
            super().validation_step(batch, batch_idx)

    monkeypatch.setattr(made, "forward", lambda *_: shown.popleft())
    logged = validate(folder, Oracle(made))
    assert not shown
    assert logged["val/mse"] == logged["val/rollout_mse_3"] == logged["val/head_kl"] == 0
    for name in ("val/gain", "val/rollout_gain_2", "val/rollout_gain_3", "val/head_kl_gain", "val/token_agreement"):
        assert logged[name] == 1
    assert logged["val/cosine"] == pytest.approx(1)
    assert logged["val/cosine_centred"] == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric PlaceMean")  # of the rank that has nothing
def test_ranks_share_validation_even_when_one_has_nothing(tmp_path: Path) -> None:
    write_set(tmp_path, num_samples=10)  # the last shard holds one trajectory
    alone = validate(tmp_path, ShortcutTask(network(1)), validation_shards=1)
    data = TrajectoryDataModule(str(tmp_path))
    trainer = L.Trainer(**QUIET, strategy="ddp_fork", devices=2)
    trainer.validate(ShortcutTask(network(1)), datamodule=data, verbose=False)
    shared = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert shared == pytest.approx(alone)


def test_guided_validation_compares_guided_features(folder: Path) -> None:
    """Made anew, the network repeats the guided features of the step before, which hold does, too."""
    made = ShortcutTask(ShortcutNet(width=6, num_heads=1, guided=True))
    data = TrajectoryDataModule(str(folder), guided=True, validation_shards=2)
    trainer = L.Trainer(**QUIET)
    trainer.validate(made, datamodule=data, verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    recorded, scales = trajectories([6, 7, 8, 9, 10]), [0.0, 2.5 / 3, 2.5 * 2 / 3, 2.5]
    errors = []
    for step in range(1, 4):
        before, after = (
            guide_rows(recorded.features[:, :, at].transpose(0, 1), scales[step], 9) for at in (step - 1, step)
        )
        errors.append((before - after)[:, :9][recorded.committed_at >= step].square().flatten())
    assert logged["val/mse"] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-5)
    assert logged["val/gain"] == pytest.approx(0, abs=1e-6)


def test_validation_holds_a_few_steps_of_features_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing on the device is as large as a trajectory: the set's features are only ever sliced by step."""
    largest: list[int] = []
    features_at = Replay.features

    def noted(self: Replay, *arguments: Any) -> Tensor:
        found = features_at(self, *arguments)
        largest.append(found.numel())
        return found

    monkeypatch.setattr(Replay, "features", noted)
    validate(folder, ShortcutTask(network(1)), validation_batch_size=2)
    assert max(largest) == 2 * 2 * 10 * 6  # B, G, S, C
