from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from datamodules.conditions import ClassLabels
from datamodules.online import OnlineDataModule
from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.acceleration.accelerated import Accelerated
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.callbacks.trajectory_writer import TrajectoryWriter
from lit_shortcut.contracts import Conditions, Trajectories, Transition
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding, sample
from lit_shortcut.tasks.recording import RecordingTask, record
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.trajectory import TrajectoryError
from lit_shortcut.trajectory.transitions import concatenated, select
from tests.tiny_trajectories import transitions

DECODING = Decoding(num_steps=5)
QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}


def make(
    *, epoch: int = 0, rank: int = 0, world_size: int = 1, precision: Any = "32-true", **arguments: Any
) -> OnlineDataModule:
    """Of 12 images an epoch in pools of 4, 32 transitions: four batches of eight."""
    module = OnlineDataModule(
        **{
            "base": ToyBase(),
            "decoding": DECODING,
            "conditions": ClassLabels(12, batch_size=2),
            "validation": ClassLabels(5, batch_size=2, seed=1),
            "batch_size": 8,
            "pool_images": 4,
            "dtype": "float32",
        }
        | arguments
    )
    trainer = L.Trainer(**QUIET, precision=precision, enable_checkpointing=False)
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=world_size,
        current_epoch=epoch,
        overfit_batches=0,
        precision=precision,
        strategy=trainer.strategy,
        precision_plugin=trainer.precision_plugin,
        lightning_module=ShortcutTask(network()),
    )
    return module


def network(**arguments: Any) -> ShortcutNet:
    """Of the toy base's width, far from hold."""
    torch.manual_seed(7)
    made = ShortcutNet(**{"width": 16, "num_heads": 2, "anchored": True} | arguments)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made.eval()


def flat(batch: Transition) -> list[Tensor]:
    """Its tensors, control without the padding."""
    assert batch.control.is_real is not None
    control = [torch.where(batch.control.is_real, part, -1) for part in batch.control[:2]]
    longest = ToyBase().spec.num_tokens
    control = [torch.nn.functional.pad(part, (0, longest - part.shape[-1]), value=-1) for part in control]
    return [batch.features, *control, batch.masked_share, batch.targets, batch.is_masked, batch.step]


def named(batches: Any) -> list[bytes]:
    """Each transition as the bytes of all it holds."""
    rows = chain.from_iterable(zip(*flat(batch), strict=True) for batch in batches)
    return [b"".join(part.numpy().tobytes() for part in row) for row in rows]


@pytest.mark.parametrize("window", [1, 3])
def test_first_epoch_has_every_transition_that_a_recorded_set_has_exactly_once(window: int) -> None:
    found = named(make(window=window, batch_size=4).train_dataloader())
    (conditions,) = ClassLabels(12, batch_size=12).loader()
    expected = named([transitions(record(ToyBase(), conditions, DECODING), window)])
    assert len(found) == 12 * 2 * (5 - window)
    assert sorted(found) == sorted(expected)


def test_gaps_give_every_two_steps_of_a_pool_once() -> None:
    batches = list(make(max_gap=4, batch_size=4).train_dataloader())
    pairs = [pair for batch in batches for pair in zip(batch.step.tolist(), batch.gap.tolist(), strict=True)]
    assert Counter(pairs) == dict.fromkeys(((step, gap) for gap in range(1, 5) for step in range(5 - gap)), 12 * 2)


def test_guided_transitions_are_those_of_a_recorded_set() -> None:
    found = named(make(guided=True, max_gap=3, batch_size=4).train_dataloader())
    (conditions,) = ClassLabels(12, batch_size=12).loader()
    recorded, spans = record(ToyBase(), conditions, DECODING), [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2)]
    spans += [(0, 3), (1, 3)]
    places, gaps = [(row, 0, step) for row in range(12) for step, _ in spans], [gap for _, gap in spans] * 12
    expected = named([select(recorded, places, gaps=gaps, guidance=DECODING.guidance_by_step)])
    assert sorted(found) == sorted(expected)


def test_guided_transitions_need_guidance() -> None:
    with pytest.raises(ValueError, match=r"guided must be false where decoding has no guidance"):
        make(guided=True, decoding=Decoding(5, guidance=0.0))


def test_batches_mix_the_images_and_steps_of_a_pool() -> None:
    for batch in make().train_dataloader():
        assert len(batch.step) == 8
        assert len(set(batch.step.tolist())) > 1
        assert len({row.numpy().tobytes() for row in batch.is_masked}) > 4


def test_same_seed_gives_the_same_batches_and_every_epoch_new_images() -> None:
    module = make()
    loader = module.train_dataloader()
    first = named(loader)
    assert named(make().train_dataloader()) == first
    reordered = named(make(seed=1).train_dataloader())
    assert reordered != first
    assert sorted(reordered) == sorted(first)
    module.trainer.current_epoch = 1  # type: ignore[misc, union-attr]
    second = named(loader)
    assert named(make(epoch=1).train_dataloader()) == second
    assert len(set(first) & set(second)) < len(first) / 4  # the first of an image's steps may be another's


def test_batches_to_overfit_are_those_of_the_first_epoch() -> None:
    module = make(epoch=1)
    module.trainer.overfit_batches = 2  # type: ignore[misc, union-attr]
    assert named(module.train_dataloader()) == named(make().train_dataloader())


@pytest.mark.parametrize("stop", [3, 4, 9])
def test_resumed_epoch_goes_on_with_the_same_batches(stop: int) -> None:
    expected = named(make(epoch=2).train_dataloader())
    loader = make(epoch=2).train_dataloader()
    begun = named(islice(loader, stop))
    resumed = make(epoch=2).train_dataloader()
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert begun + named(resumed) == expected


def test_place_among_other_batches_is_refused() -> None:
    state = make().train_dataloader().state_dict()
    with pytest.raises(TrajectoryError, match="pool_images was 4, is 6"):
        make(pool_images=6).train_dataloader().load_state_dict(state)


def test_resuming_draws_the_pool_it_stopped_in_and_none_before(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def noted(base: Any, conditions: Conditions, decoding: Decoding, **options: Any) -> Trajectories:
        drawn.extend(conditions.ids.tolist())
        return record(base, conditions, decoding, **options)

    monkeypatch.setattr("datamodules.online.record", noted)
    loader = make().train_dataloader()
    loader.load_state_dict(loader.state_dict() | {"done": 9})
    assert len(named(loader)) == 3 * 8
    assert len(drawn) == len(set(drawn)) == 4


def test_ranks_draw_different_pools_which_together_are_those_of_one_rank() -> None:
    alone = named(make().train_dataloader())
    shares = [named(make(rank=rank, world_size=3).train_dataloader()) for rank in range(3)]
    assert [len(share) for share in shares] == [32, 32, 32]
    assert sorted(chain.from_iterable(shares)) == sorted(alone)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_validation_draws_what_predict_records(tmp_path: Path, precision: Any, dtype: Any) -> None:
    conditions = ClassLabels(6, batch_size=2, seed=5)
    recorded_in = precision.replace("mixed", "true")  # a frozen base gains nothing from float32 weights
    trainer = L.Trainer(**QUIET, precision=recorded_in, callbacks=[TrajectoryWriter(tmp_path, dtype)])
    trainer.predict(RecordingTask(ToyBase(), decoding=DECODING), conditions)
    recorded = TrajectoryDataModule(str(tmp_path), validation_shards=2, validation_batch_size=2)
    drawn = make(validation=ClassLabels(6, batch_size=2, seed=5), dtype=dtype, precision=precision)
    for ours, theirs in zip(islice(drawn.val_dataloader(), 1, None), recorded.val_dataloader(), strict=True):
        for name in ("features", "tokens", "committed_at"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_validation_is_always_the_same_and_shared_out_among_ranks() -> None:
    def ids(batches: Any) -> list[list[int]]:
        return [batch.conditions.ids.tolist() for batch in batches]

    loader = make().val_dataloader()
    assert ids(loader) == ids(loader) == [[0, 1], [2, 3], [4]]
    assert [ids(make(rank=rank, world_size=2).val_dataloader()) for rank in (0, 1)] == [[[0, 1], [4]], [[2, 3]]]


def test_pool_of_different_texts_has_the_transitions_of_all_its_batches(
    dimoo: DiMOO, prompted: Callable[..., Conditions]
) -> None:
    whole = prompted(4)
    parts = [Conditions(*(part[rows] for part in whole)) for rows in (slice(0, 2), slice(2, 4))]
    pool, expected = concatenated([record(dimoo, part, DECODING) for part in parts]), record(dimoo, whole, DECODING)
    assert pool.conditions.prompts == expected.conditions.prompts
    ours, theirs = transitions(pool), transitions(expected)
    assert ours.prefix is not None
    assert theirs.prefix is not None
    is_text = torch.arange(ours.prefix.control.shape[1]) < ours.prefix.num_control[:, None]
    texts = [text._replace(control=text.control.where(is_text[..., None], 0)) for text in (ours.prefix, theirs.prefix)]
    for one, other in zip((*flat(ours), *texts[0]), (*flat(theirs), *texts[1]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("over", "stays"), [(0, True), (1, False)])
def test_pool_stays_on_the_device_if_two_fit(monkeypatch: pytest.MonkeyPatch, over: int, stays: bool) -> None:
    found: list[bool] = []
    draw = OnlineDataModule.draw

    def noted(self: OnlineDataModule, conditions: Conditions, *, stays: bool = False, **options: Any) -> Trajectories:
        found.append(stays)
        return draw(self, conditions, stays=stays, **options)

    monkeypatch.setattr(OnlineDataModule, "draw", noted)
    spec = ToyBase().spec
    two_pools = 2 * 4 * 2 * 5 * spec.sequence_length * spec.width * 4
    module = make(device_memory_gb=(two_pools - over) / 1e9)
    next(iter(module.train_dataloader()))
    next(iter(module.val_dataloader()))
    assert found == [stays, stays, False]


def test_windows_of_features_on_a_device_are_put_together_there() -> None:
    (conditions,) = ClassLabels(4, batch_size=4).loader()
    recorded, places = record(ToyBase(), conditions, DECODING), [(0, 0, 3), (2, 1, 0)]
    found = select(recorded._replace(features=recorded.features.to("meta")), places)
    expected = select(recorded, places)
    for name in ("features", "targets"):
        assert getattr(found, name).device == torch.device("meta")
        assert getattr(found, name).shape == getattr(expected, name).shape
    assert torch.equal(found.is_masked, expected.is_masked)


# ---- on policy


@pytest.mark.parametrize("anchored", [True, False])
def test_network_in_training_draws_the_tokens_and_the_base_computes_their_features(anchored: bool) -> None:
    module, base = make(on_policy_budget=2, max_gap=1, pool_images=12), ToyBase()
    own = network(anchored=anchored)
    module.trainer.lightning_module = ShortcutTask(own)  # type: ignore[union-attr]
    pool = module._pool(0, 0)
    (conditions,) = ClassLabels(12, batch_size=12).loader()
    method = Accelerated(Even(2), Shortcut(own))
    for step in sample(base, conditions, DECODING, method):
        at = step.state.clock.step
        context = base.context(conditions, guided=True)
        assert torch.equal(
            pool.features[:, :, at].transpose(0, 1), base.features(step.state.tokens, context, step.state.clock)
        )
        assert step.is_full == torch.equal(step.features, pool.features[:, :, at].transpose(0, 1))
    assert torch.equal(pool.tokens, step.tokens)
    assert not torch.equal(pool.tokens, record(base, conditions, DECODING).tokens)


def test_pool_on_policy_follows_the_weights_as_they_are() -> None:
    module = make(on_policy_budget=2)
    task = module.trainer.lightning_module  # type: ignore[union-attr]
    first = module._pool(0, 0).tokens
    module._pool.cache_clear()
    assert torch.equal(module._pool(0, 0).tokens, first)
    with torch.no_grad():
        for parameter in task.network.parameters():
            parameter.mul_(-1)
    module._pool.cache_clear()
    assert not torch.equal(module._pool(0, 0).tokens, first)


def test_a_base_pass_at_every_step_is_the_base_s_own_policy() -> None:
    assert named(make(on_policy_budget=5).train_dataloader()) == named(make().train_dataloader())


def test_validation_stays_on_the_base_s_own_tokens() -> None:
    ours, theirs = make(on_policy_budget=1).val_dataloader(), make().val_dataloader()
    assert all(torch.equal(one.tokens, other.tokens) for one, other in zip(ours, theirs, strict=True))


def test_task_without_a_network_to_draw_with_is_refused() -> None:
    module = make(on_policy_budget=2)
    module.trainer.lightning_module = RecordingTask(ToyBase())  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"on_policy_budget needs a ShortcutTask.* got RecordingTask"):
        next(iter(module.train_dataloader()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"on_policy_budget": 0}, r"on_policy_budget must lie in 1\.\.5, the number of steps; got 0"),
        ({"on_policy_budget": 6}, r"on_policy_budget must lie in 1\.\.5, the number of steps; got 6"),
        ({"window": 5}, "window must be below 5.*got 5"),
        ({"max_gap": 5}, "max_gap must be below 5.*got 5"),
        ({"window": 0}, "window must be at least 1"),
        ({"window": 2, "max_gap": 2}, "window 2 and max_gap 2"),
        ({"pool_images": 3}, "pool_images must be a multiple of .* 2; got 3"),
        ({"pool_images": 0}, "pool_images must be a multiple of .* 2; got 0"),
        ({"batch_size": 33}, r"batch_size must lie in 1\.\.32, the transitions in a pool; got 33"),
        ({"validation": ClassLabels(5)}, r"validation\.seed .* 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_epoch_that_fills_no_pool_on_each_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="12 images an epoch do not fill 4 pools of 4"):
        make(world_size=4).train_dataloader()
