"""Trajectories of a base that takes prompts, from recording to training: rows and control differ in number."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from datamodules.prompts import Prompts
from datamodules.trajectories import TrajectoryDataModule
from datamodules.windows import Order, WindowReader
from lit_shortcut.acceleration.accelerated import Accelerated
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.replay import RecordedEnds
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.toy_cross import CrossToyBase
from lit_shortcut.callbacks.trajectory_writer import TrajectoryWriter
from lit_shortcut.contracts import Conditions, Trajectories
from lit_shortcut.losses import MaskedMSE
from lit_shortcut.networks.control import lay_out_transition
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.networks.shortcut import ShortcutNet, ShortcutNetwork
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.recording import RecordingTask, record
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.trajectory import FORMAT_VERSION, Card, Source, TrajectoryError, problems, read_shard, write_shard
from lit_shortcut.trajectory.interface_file import interface_fingerprint, load_interface, save_interface
from lit_shortcut.trajectory.transitions import concatenated, select
from lit_shortcut.weights import WeightsError
from tests.forged_shards import forge
from tests.tiny_trajectories import adopt

MakeConditions = Callable[..., Conditions]
DECODING = Decoding(5, "cosine_left", guidance=2.0, guidance_course="constant", temperature=0, confidence_noise=0)
FRAME = 16 + 4 + 4  # rows beside the prompt's
LENGTHS = [11, 5, 17, 7, 10]  # of the prompts, template included; the unconditional one has 3


@pytest.fixture
def recorded(dimoo: DiMOO, prompted: MakeConditions) -> Trajectories:
    return record(dimoo, prompted(5), DECODING)


def rows_of(recorded: Trajectories, start: int, stop: int) -> Trajectories:
    assert recorded.prefix is not None
    text = type(recorded.prefix)(*(part[start:stop] for part in recorded.prefix))
    conditions = Conditions(*(part[start:stop] for part in recorded.conditions))
    return Trajectories(conditions, *(part[start:stop] for part in recorded[1:4]), text)


@pytest.fixture
def card(dimoo: DiMOO) -> Card:
    return Card(
        format_version=FORMAT_VERSION,
        base={"fingerprint": dimoo.fingerprint},
        interface=interface_fingerprint(dimoo.interface),
        spec=dimoo.spec._asdict(),
        decoding=asdict(DECODING),
        branches=2,
        num_steps=5,
        precision="32-true",
        encoding="float32",
        text_rows=True,
        num_samples=5,
        samples_per_shard=3,
        seed=0,
        num_classes=5,
        prompts="0" * 64,
    )


@pytest.fixture
def folder(tmp_path: Path, dimoo: DiMOO, recorded: Trajectories, card: Card) -> Path:
    card.write(tmp_path)
    save_interface(tmp_path, dimoo.interface)
    write_shard(tmp_path, 0, rows_of(recorded, 0, 3), card)
    write_shard(tmp_path, 1, rows_of(recorded, 3, 5), card)
    return tmp_path


def read_set(folder: Path, card: Card) -> list[Trajectories]:
    return [one for shard in range(card.num_shards) for one in read_shard(folder, shard, card)]


def trained(**options: Any) -> LLaDAShortcutNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = LLaDAShortcutNet(16, num_heads=2, mlp_width=32, **options)
        assert isinstance(network.widen, torch.nn.Linear)
        torch.nn.init.normal_(network.widen.weight, std=0.3)
    return network.eval()


def task(network: ShortcutNetwork, dimoo: DiMOO, **arguments: Any) -> ShortcutTask:
    made = ShortcutTask(network, **arguments)
    made.use(RecordedEnds(dimoo.spec, dimoo.interface, dimoo.fingerprint))
    return made


def test_reader_returns_what_writer_wrote(folder: Path, card: Card, recorded: Trajectories) -> None:
    found = concatenated(read_set(folder, Card.read(folder)))
    assert found.conditions.prompts == recorded.conditions.prompts
    assert torch.equal(found.features, recorded.features)
    assert torch.equal(found.tokens, recorded.tokens)
    assert found.prefix is not None
    assert recorded.prefix is not None
    assert found.prefix.lengths.tolist() == recorded.prefix.lengths.tolist() == [[length, 3] for length in LENGTHS]
    assert found.prefix.num_control.tolist() == recorded.prefix.num_control.tolist() == [[n, 0] for n in LENGTHS]
    for row, length in enumerate(LENGTHS):
        assert torch.equal(found.prefix.control[row, 0, :length], recorded.prefix.control[row, 0, :length])


def test_sample_takes_the_rows_of_its_own_prompt_whatever_its_batch(
    folder: Path, card: Card, dimoo: DiMOO, prompted: MakeConditions
) -> None:
    assert [one.features.shape[3] for one in read_set(folder, card)] == [FRAME + length for length in LENGTHS]
    conditions = Conditions(*(part[3:] for part in prompted(5)))
    write_shard(
        folder / "apart", 1, record(dimoo, conditions, DECODING), card
    )  # the longest has 10 tokens here, not 17
    for one, other in zip(read_set(folder, card)[3:], read_shard(folder / "apart", 1, card), strict=True):
        torch.testing.assert_close(one.features, other.features, rtol=1e-4, atol=1e-5)


def test_interface_beside_the_shards_knows_the_rows_places(folder: Path, card: Card, dimoo: DiMOO) -> None:
    found, lengths = load_interface(folder, card), torch.tensor([4, 9])
    for mine, theirs in zip(found.row_places(lengths, 40), dimoo.interface.row_places(lengths, 40), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"uses_control": False},
        {"uses_prefix": False},
        {"rows": "masked"},
        {"anchored": True},
        {"guided": True},
        {"guided": True, "anchored": True},
    ],
)
@pytest.mark.parametrize("gap", [1, 3])
def test_training_predicts_what_sampling_does(
    folder: Path, card: Card, dimoo: DiMOO, prompted: MakeConditions, options: dict[str, Any], gap: int
) -> None:
    """Samples and branches mixed and padded in one training batch, against the predictor along recorded tokens."""
    network, recorded = trained(**options), concatenated(read_set(folder, card))
    made = task(network, dimoo)
    made.card, is_guided = card, network.options.guided
    replay, guidance = made.replay(recorded), DECODING.guidance_by_step if is_guided else None
    run = Accelerated(Even(1), Shortcut(network)).start(replay, replay.recorded, replay.counts)
    features = [run(state)[0] for state in replay.states()]
    branches = range(1 if is_guided else 2)
    places = [(row, branch, 0) for row in range(5) for branch in branches]
    if network.options.anchored:
        batch = select(recorded, places, gaps=[gap] * len(places), guidance=guidance)
        following = made.predict(batch, 0)
    else:
        following = made.predict(select(recorded, places, gap, guidance=guidance), gap - 1)
    for row in range(5):
        for branch in branches:
            num_rows = FRAME + (LENGTHS[row] if branch == 0 else 3)
            found = following[len(branches) * row + branch, :num_rows]
            torch.testing.assert_close(found, features[gap][branch, row, :num_rows], rtol=1e-4, atol=1e-5)


def test_loss_over_all_rows_leaves_out_padding(folder: Path, card: Card, dimoo: DiMOO) -> None:
    batch = select(concatenated(read_set(folder, card)), [(row, branch, 1) for row in range(5) for branch in range(2)])
    loss = MaskedMSE(rows="all")
    made = task(trained(), dimoo, losses={"mse": loss})
    real = made.where(batch, 0)["all"]
    assert real.sum(1).tolist() == [FRAME + n for length in LENGTHS for n in (length, 3)]
    following = made.predict(batch, 0)
    squares = torch.cat(
        [
            (following[row, :n] - batch.targets[row, 0, :n]).square().flatten()
            for row, n in enumerate(real.sum(1).tolist())
        ]
    )
    found = loss(following, batch.targets[:, 0], real, dimoo.interface)
    torch.testing.assert_close(found, squares.mean(), rtol=1e-5, atol=1e-7)


def test_fit_takes_the_set_and_refuses_the_network_of_another_base(folder: Path) -> None:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    data = TrajectoryDataModule(str(folder), batch_size=4)
    trainer = L.Trainer(max_steps=2, enable_checkpointing=False, num_sanity_val_steps=0, **quiet)  # type: ignore[arg-type]
    made = ShortcutTask(LLaDAShortcutNet(16, num_heads=2, mlp_width=32), losses={"mse": MaskedMSE(rows="all")})
    trainer.fit(made, datamodule=data)
    trainer.validate(made, datamodule=data, verbose=False)
    assert torch.isfinite(torch.tensor([float(value) for value in trainer.callback_metrics.values()])).all()
    with pytest.raises(WeightsError, match=r"expected a LLaDAShortcutNet, found a ShortcutNet"):
        trainer.fit(ShortcutTask(ShortcutNet(16, num_heads=2)), datamodule=data)


@pytest.mark.parametrize("guidance", [None, [0.0, 0.5, 1.0, 1.5, 2.0]])
def test_batch_read_from_shards_is_the_batch_cut_from_trajectories(
    folder: Path, card: Card, guidance: list[float] | None
) -> None:
    order = Order(1, rows=3, branches=1 if guidance else 2, starts=3, group=1, seed=0)
    found = WindowReader(Source(folder, card), order, 2, guidance=guidance).read(0, range(7)).decode()
    places = [order.at(0, position)[1:4] for position in range(7)]
    expected = select(concatenated(list(read_shard(folder, 0, card))), places, 2, guidance=guidance)
    assert found.prefix is not None
    assert expected.prefix is not None
    assert torch.equal(found.features, expected.features)
    mine, theirs = ((*batch.control, *batch[2:6], *(batch.prefix or ())) for batch in (found, expected))
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)


def test_batch_of_one_trains_without_masks(folder: Path, card: Card, dimoo: DiMOO) -> None:
    order = Order(1, card.samples_per_shard, 2, 4, group=1, seed=0)
    reader = WindowReader(Source(folder, card), order, 1)
    for position in range(len(order)):
        batch = reader.read(0, range(position, position + 1)).decode()
        layout = lay_out_transition(LLaDAShortcutNet(16, num_heads=2), dimoo.interface, batch)
        assert layout is not None
        assert batch.control.is_real is layout.is_real is layout.control.is_real is None


def test_prompts_of_equal_length_train_without_masks_on_any_device(folder: Path, card: Card, dimoo: DiMOO) -> None:
    recorded = concatenated(read_set(folder, card))
    equal, unequal = ([(row, branch, 1) for row in range(5)] for branch in (1, 0))
    for places, is_padded in ((equal, False), (unequal, True)):
        batch = move_data_to_device(select(recorded, places), torch.device("meta"))  # gives no value away
        layout = lay_out_transition(LLaDAShortcutNet(16, num_heads=2), deepcopy(dimoo.interface).to("meta"), batch)
        assert layout is not None
        assert (layout.is_real is not None) == (layout.control.is_real is not None) == is_padded


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prefix.lengths", b"\xff" * 8, "features: expected|prefix.control.npy: expected"),
        ("prefix.lengths", b"\x0b\0\0\0\x04\0\0\0", "features: expected 23 rows and those of texts"),
        ("prefix.control", bytes(64), "prefix.control.npy: expected 11 rows, found 1"),
    ],
)
def test_texts_that_do_not_fit_the_rows_are_refused(
    folder: Path, card: Card, name: str, content: bytes, message: str
) -> None:
    member = f"00000000.{name}.npy"
    forge(folder, 0, lambda members: members | {member: members[member][:128] + content})
    with pytest.raises(TrajectoryError, match=rf"sample 00000000: ({message})"):
        next(read_shard(folder, 0, card))


def test_set_says_whether_its_features_have_rows_of_a_text(folder: Path, tmp_path: Path, card: Card) -> None:
    assert list(problems(folder)) == []
    other = adopt(folder, replace(card, text_rows=False))
    with pytest.raises(TrajectoryError, match="sample 00000000: features: expected 56 rows"):
        next(read_shard(folder, 0, other))


def test_verify_names_a_sample_of_another_frame(folder: Path, card: Card, recorded: Trajectories) -> None:
    """Two more rows beside the text, as another template would give."""
    padded = torch.nn.functional.pad(recorded.features, (0, 0, 0, 2))
    other = rows_of(recorded._replace(features=padded), 3, 5)
    write_shard(folder, 1, other, replace(card, spec=card.spec | {"sequence_length": 100}))
    made = replace(card, spec=card.spec | {"sequence_length": 100})
    adopt(folder, made)
    found = list(problems(folder))
    assert [problem.rpartition(":")[0] for problem in found] == [f"{folder}/shard-000001.tar: sample 00000003"]


def test_base_with_prompts_and_no_text_rows_is_recorded_and_trained_from(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\ntwo cats\n")
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(**quiet, callbacks=[TrajectoryWriter(tmp_path / "set")])
    task = RecordingTask(CrossToyBase(), decoding=Decoding(num_steps=4))
    trainer.predict(task, datamodule=Prompts(tmp_path / "prompts.txt", num_images=8, batch_size=2))
    made = Card.read(tmp_path / "set")
    assert (bool(made.prompts), made.text_rows) == (True, False)
    assert list(problems(tmp_path / "set")) == []
    (one, _) = read_shard(tmp_path / "set", 0, made)
    assert one.conditions.prompts == ("a cat",)
    data = TrajectoryDataModule(str(tmp_path / "set"), batch_size=4)
    data.setup("fit")
    assert next(iter(data.train_dataloader())).decode().prefix is None
