from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.callbacks.ema import ModuleEMA
from lit_shortcut.callbacks.replay_table import ReplayTable
from lit_shortcut.losses import HeadKL, Loss, MaskedMSE, masked_tokens
from lit_shortcut.metrics.functional import head_kl, masked_mse
from lit_shortcut.metrics.places import PlaceMean, diagnostics
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.trajectory import Card, write_shard
from lit_shortcut.trajectory.interface_file import save_interface
from lit_shortcut.weights import WeightsError, load_module_with_metadata, save_module
from tests.reads import Reads
from tests.tasks.shortcut_runs import QUIET, Task, batch_of, network, validate
from tests.tiny_trajectories import card, interface, trajectories

# ---- training


def test_untrained_network_has_the_loss_of_hold_and_no_gain(folder: Path) -> None:
    task, batch = Task(folder, network()), batch_of(folder)
    loss = task.training_step(batch, 0)
    errors = [
        (target - features).square()
        for features, target, masked in zip(batch.features, batch.targets[:, 0], batch.is_masked[:, 0], strict=True)
        for features, target in [(features[:9][masked], target[:9][masked])]
    ]
    assert loss.item() == pytest.approx(torch.cat(errors).mean().item(), rel=1e-5)
    assert task.logged["train/gain"] == 0
    assert task.logged["train/mse"] == task.logged["train/loss"] == loss.detach()


def test_training_logs_the_cosine_over_masked_places_and_its_gain_over_hold(folder: Path) -> None:
    batch = batch_of(folder)
    held, target, is_masked = batch.features, batch.targets[:, 0], batch.is_masked[:, 0]
    task = Task(folder, network())
    task.training_step(batch, 0)
    expected = torch.nn.functional.cosine_similarity(held[:, :9][is_masked], target[:, :9][is_masked]).mean()
    torch.testing.assert_close(task.logged["train/cosine"], expected)
    assert task.logged["train/cosine_gain"] == 0  # an untrained network holds
    trained = Task(folder, network(1))
    trained.training_step(batch, 0)
    gain = 1 - (1 - trained.logged["train/cosine"]) / (1 - expected)
    torch.testing.assert_close(trained.logged["train/cosine_gain"], gain)


def test_compiled_network_is_the_task_own_under_its_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []

    def compile_in_place(module: torch.nn.Module, fullgraph: bool) -> None:
        assert fullgraph
        compiled.append(module)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_in_place)
    monkeypatch.setattr("lit_shortcut.tasks.shortcut.require_compiler", lambda device: None)
    plain, task = Task(folder, network(1)), Task(folder, network(1), compiled=True)
    assert compiled == [task.network]
    assert task.network.state_dict().keys() == plain.network.state_dict().keys()


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_missing_compiler_is_named_before_anything_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    task, data = ShortcutTask(network(1), compiled=True), TrajectoryDataModule(str(folder))
    with pytest.raises(ValueError, match=r"compiled: true.*no-such-compiler was not found"):
        getattr(L.Trainer(**QUIET, max_steps=1), stage)(task, datamodule=data)


def test_padding_of_the_control_does_not_change_the_loss(folder: Path) -> None:
    task, batch = Task(folder, network(1)), batch_of(folder)
    control = batch.control
    assert control.is_real is not None
    assert not control.is_real.all()  # steps commit 1, 2 or 3 tokens
    other = control._replace(tokens=torch.where(control.is_real, control.tokens, 4))
    assert not torch.equal(other.tokens, control.tokens)
    torch.testing.assert_close(task.training_step(batch._replace(control=other), 0), task.training_step(batch, 0))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_is_added_by_its_weight(folder: Path, temperature: float) -> None:
    batch = batch_of(folder)
    plain = Task(folder, network(1)).training_step(batch, 0)
    task = Task(folder, network(1), losses={"mse": MaskedMSE(), "kl": HeadKL(0.7, temperature)})
    loss = task.training_step(batch, 0)
    prediction = task(
        batch.features, type(batch.control)(*(part[:, 0] for part in batch.control)), batch.masked_share[:, 0]
    )
    ends = interface()
    kl = head_kl(ends.logits(batch.targets[:, 0]), ends.logits(prediction), temperature)[batch.is_masked[:, 0]].mean()
    assert kl > 0.01
    torch.testing.assert_close(loss, plain + 0.7 * kl)
    torch.testing.assert_close(task.logged["train/kl"], kl.detach())


def test_all_rows_count_when_asked_for(folder: Path) -> None:
    batch = batch_of(folder)
    expected = (batch.features - batch.targets[:, 0]).square().mean()
    torch.testing.assert_close(
        Task(folder, network(), losses={"mse": MaskedMSE(rows="all")}).training_step(batch, 0), expected
    )
    assert not torch.isclose(Task(folder, network()).training_step(batch, 0), expected)


def test_depth_is_drawn_within_the_window_and_the_gradient_runs_through_its_last_step(folder: Path) -> None:
    batch, made = batch_of(folder, window=2), network(1)
    task = Task(folder, made)

    def gradients(loss: Tensor) -> Tensor:
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(made.parameters()))])

    def step(features: Tensor, offset: int) -> Tensor:
        control = type(batch.control)(*(part[:, offset] for part in batch.control))
        following: Tensor = task(features, control, batch.masked_share[:, offset])
        return following

    once = step(batch.features, 0)
    by_depth = {
        1: gradients(masked_mse(once, batch.targets[:, 0], batch.is_masked[:, 0])),
        2: gradients(masked_mse(step(once.detach(), 1), batch.targets[:, 1], batch.is_masked[:, 1])),
    }
    through_both = gradients(masked_mse(step(step(batch.features, 0), 1), batch.targets[:, 1], batch.is_masked[:, 1]))
    assert not torch.allclose(by_depth[2], through_both)
    drawn = []
    for batch_idx in range(12):
        found = gradients(task.training_step(batch, batch_idx))
        drawn += [depth for depth, expected in by_depth.items() if torch.allclose(found, expected, atol=1e-7)]
        assert len(drawn) == batch_idx + 1
        assert torch.equal(found, gradients(task.training_step(batch, batch_idx)))  # the same when taken up again
    assert set(drawn) == {1, 2}


def test_loss_that_is_not_finite_is_refused_with_step_and_batch(folder: Path) -> None:
    made = network()
    torch.nn.init.constant_(made.widen.bias, float("nan"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="training loss is nan at optimiser step 7"):
        Task(folder, made).training_step(batch_of(folder), 0)


def test_checkpoint_is_refused_by_its_weights_and_asks_no_other_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal makes each rank save wherever it happens to be."""

    def sum_over_ranks(values: Tensor) -> Tensor:
        raise AssertionError("a reduction")

    monkeypatch.setattr("lit_shortcut.tasks.shortcut.sum_over_ranks", sum_over_ranks)
    task = Task(folder, network())
    task.on_save_checkpoint({"state_dict": task.state_dict()})
    torch.nn.init.constant_(task.network.widen.bias, float("nan"))
    with pytest.raises(ValueError, match="training loss is nan at optimiser step 7"):
        task.on_save_checkpoint({"state_dict": task.state_dict()})


def test_other_width_is_refused_and_both_are_named(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"features are 6 wide.*built for width 8.*to 6"):
        Task(folder, ShortcutNet(width=8, num_heads=1))


def test_neighbourhood_on_another_grid_is_refused(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"on a grid of \(3, 3\); grid of the shortcut gives \(4, 4\)"):
        Task(folder, ShortcutNet(width=6, num_heads=1, grid=4, reach=1))
    with pytest.raises(WeightsError, match="9 image rows; stride 3 of the shortcut gives 1"):
        Task(folder, ShortcutNet(width=6, num_heads=1, grid=3, reach=1, stride=3))


def test_rollout_of_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="rollout_depth must be at least 1, got 0"):
        ShortcutTask(network(), rollout_depth=0)


def linear_set(folder: Path) -> Card:
    """Trajectories whose velocity is a linear function of the features, f + A·f with a fixed rotation A."""
    made = card(num_samples=30, samples_per_shard=10)
    made.write(folder)
    save_interface(folder, interface())
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    for index in range(made.num_shards):
        drawn = trajectories(list(made.ids(index)))
        steps = [drawn.features[:, :, 0].remainder(2)]
        for _ in range(made.num_steps - 1):
            steps.append(steps[-1] + 0.5 * steps[-1] @ turn)
        write_shard(folder, index, drawn._replace(features=torch.stack(steps, dim=2)), made)
    return made


def test_loaded_network_is_trained_on(folder: Path, tmp_path: Path) -> None:
    save_module(tmp_path / "model.safetensors", network(seed=1))
    loaded = ShortcutNet.load(tmp_path / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    trainer = L.Trainer(**QUIET, max_steps=1, limit_val_batches=0)
    trainer.fit(ShortcutTask(loaded), datamodule=TrajectoryDataModule(str(folder), batch_size=4))
    assert loaded.training
    assert all(not torch.equal(parameter, before[name]) for name, parameter in loaded.named_parameters())


def test_short_fit_learns_a_linear_velocity(tmp_path: Path) -> None:
    linear_set(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = ShortcutNet(width=6, num_heads=1, bottleneck_ratio=1.2)
        task = ShortcutTask(made, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
        trainer = L.Trainer(**QUIET, max_steps=80, val_check_interval=80, check_val_every_n_epoch=None)
        trainer.fit(task, datamodule=TrajectoryDataModule(str(tmp_path), batch_size=32))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["val/mse"] < 0.5 * logged["val/mse_hold"]
    assert logged["val/gain"] == pytest.approx(1 - logged["val/mse"] / logged["val/mse_hold"])
    assert logged["val/rollout_gain_3"] > 0.5
    assert logged["val/cosine_gain"] > 0


# ---- checkpoints


def test_checkpoint_holds_the_network_alone_and_what_ties_it_to_its_base(folder: Path, tmp_path: Path) -> None:
    task = ShortcutTask(network(1), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    trainer = L.Trainer(**QUIET, max_steps=2, limit_val_batches=0)
    trainer.fit(task, datamodule=TrajectoryDataModule(str(folder), batch_size=8))
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    checkpoint = torch.load(tmp_path / "fit.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == {f"network.{name}" for name in task.network.state_dict()}
    loaded, facts = load_module_with_metadata((ShortcutNet,), tmp_path / "fit.ckpt")
    assert facts["base_fingerprint"] == "0123456789abcdef"
    assert facts["decoding"] == card().decoding
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, task.network.state_dict()[name])
    again = ShortcutTask(network())
    assert validate(folder, task) != validate(folder, again)
    L.Trainer(**QUIET).validate(
        again, datamodule=TrajectoryDataModule(str(folder)), ckpt_path=tmp_path / "fit.ckpt", weights_only=True
    )
    assert validate(folder, task) == validate(folder, again)


# ---- precision


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("options", [{}, {"anchored": True, "rows": "masked"}])
def test_fit_and_validate_run_in_every_precision(folder: Path, precision: Any, options: dict[str, Any]) -> None:
    losses: dict[str, Loss] = {"mse": MaskedMSE(), "kl": HeadKL()}
    task = ShortcutTask(ShortcutNet(width=6, num_heads=1, **options), losses=losses)
    ema, table = ModuleEMA(0.9), ReplayTable([1, 2])
    trainer = L.Trainer(**QUIET, max_steps=3, log_every_n_steps=1, precision=precision, callbacks=[ema, table])
    steps = {"max_gap": 2} if options else {"window": 2}
    trainer.fit(task, datamodule=TrajectoryDataModule(str(folder), batch_size=8, **steps))
    assert trainer.global_step == 3
    trainer.validate(task, datamodule=TrajectoryDataModule(str(folder)), verbose=False)
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())
    kinds = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert {parameter.dtype for parameter in task.network.parameters()} == {kinds[precision]}
    assert {buffer.dtype for buffer in task.ends.interface.buffers()} == {kinds[precision]}
    assert task.rollouts is not None
    sums = [measure.total for measure in task.rollouts.modules() if isinstance(measure, PlaceMean)]
    assert {total.dtype for total in sums} == {torch.float32}  # bfloat16 does not add 1 to 256


def test_float16_weights_validate_and_do_not_train(folder: Path) -> None:
    task, data = ShortcutTask(network(1)), TrajectoryDataModule(str(folder))
    with pytest.raises(ValueError, match=r"trainer\.precision: 16-true"):
        L.Trainer(**QUIET, max_steps=1, precision="16-true").fit(task, datamodule=data)
    single = validate(folder, ShortcutTask(network(1)))
    trainer = L.Trainer(**QUIET, precision="16-true")
    trainer.validate(ShortcutTask(network(1)), datamodule=TrajectoryDataModule(str(folder), validation_shards=2))
    assert float(trainer.callback_metrics["val/mse"]) == pytest.approx(single["val/mse"], rel=1e-2)


# ---- memory, names and what goes through the command line


def test_interface_is_no_submodule_and_follows_the_task(folder: Path) -> None:
    task = Task(folder, network())
    assert not [name for name, _ in task.named_buffers() if "interface" in name or "embedding" in name]
    task.to(torch.float64)
    assert task.ends.interface.code_embedding.dtype == torch.float64


def test_diagnostics_run_at_log_steps_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    task, batch = Task(folder, network(1)), batch_of(folder)
    monkeypatch.setattr(
        "lit_shortcut.tasks.shortcut.diagnostics", lambda *arguments: calls.append(1) or diagnostics(*arguments)
    )
    for step in range(8):
        task.stand_in.global_step = step
        task.logged.clear()
        task.training_step(batch, step)
        assert bool(task.logged) == (step in (3, 7))
    assert len(calls) == 2


@pytest.mark.parametrize("options", [{}, {"rows": "masked"}, {"anchored": True}])
@pytest.mark.parametrize("losses", [None, {"mse": MaskedMSE(), "kl": HeadKL()}])
def test_training_step_waits_for_no_device(
    folder: Path, options: dict[str, Any], losses: dict[str, Loss] | None
) -> None:
    made = ShortcutNet(width=6, num_heads=1, **options)
    window = 1 if made.options.anchored else 2
    task, batch = Task(folder, made, losses=losses), batch_of(folder, window)
    task.stand_in.global_step = 0
    with Reads() as mode:
        task.training_step(batch, 0).backward()
    assert mode.count == 0
    assert not task.logged


def test_masked_tokens_are_the_same_whether_counted_on_the_host_or_not(folder: Path) -> None:
    batch = batch_of(folder, window=2)
    for offset, count in enumerate(batch.num_masked):
        is_masked = batch.is_masked[:, offset]
        assert torch.equal(masked_tokens(is_masked, count), masked_tokens(is_masked, None))


@pytest.mark.parametrize(("anchored", "steps"), [(True, {"window": 2}), (False, {"max_gap": 2})])
def test_windows_are_for_steps_in_a_row_and_gaps_for_anchored_networks(
    folder: Path, anchored: bool, steps: dict[str, int]
) -> None:
    task = ShortcutTask(ShortcutNet(width=6, num_heads=1, anchored=anchored))
    with pytest.raises(ValueError, match="anchored"):
        L.Trainer(**QUIET, max_steps=1).fit(task, datamodule=TrajectoryDataModule(str(folder), **steps))


@pytest.mark.parametrize("guided", [False, True])
def test_guided_networks_need_guided_transitions_and_others_none(folder: Path, guided: bool) -> None:
    task = ShortcutTask(ShortcutNet(width=6, num_heads=1, guided=guided))
    data = TrajectoryDataModule(str(folder), guided=not guided)
    with pytest.raises(ValueError, match=f"data.guided is {str(not guided).lower()}, and guided of model.network"):
        L.Trainer(**QUIET, max_steps=1).fit(task, datamodule=data)


@pytest.mark.parametrize("name", ["loss", "gain"])
def test_name_that_is_logged_already_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"train/{name}"):
        ShortcutTask(network(), losses={name: MaskedMSE()})
