"""Everything runs on a GPU that isn't there: a fake device raises at every value read back and at every mix of devices.

Shapes, types and devices of all tensors are computed, their values are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

from lit_shortcut.acceleration.accelerated import Accelerated, Past, Vanilla
from lit_shortcut.acceleration.plans import Adaptive
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.contracts import Conditions, MaskedImageModel, Trajectories, Transition
from lit_shortcut.decoding.halton import halton_order
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.decoding.unmasking import sample_codes
from lit_shortcut.losses import HeadKL, MaskedMSE
from lit_shortcut.metrics.places import PlaceMean
from lit_shortcut.networks.shortcut import ShortcutNetwork
from lit_shortcut.sampling import Decoding, generate, sample
from lit_shortcut.tasks import room
from lit_shortcut.tasks.recording import record
from lit_shortcut.tasks.room import HostRing, HostRoom
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.trajectory.transitions import select
from tests.gpu.cases import CASES, accelerations
from tests.gpu.launches import Launches, launches_of

NUM_STEPS, CUDA = 3, "cuda:0"
META = "meta"
DRAWS_DEPTH_2 = 2  # number of a batch for which the task draws two predictions in a row
DECODINGS = {
    "default": Decoding(NUM_STEPS),
    "unguided": Decoding(NUM_STEPS, guidance=0.0, temperature=0.7),
    "halton": Decoding(NUM_STEPS, order="halton_rolled"),
    "bfloat16": Decoding(NUM_STEPS, noise_dtype="bfloat16"),
}


class OnDevice(NamedTuple):
    """A case with all its tensors on the fake device, and the mode that computes with them."""

    mode: FakeTensorMode
    base: MaskedImageModel
    network: ShortcutNetwork
    task: ShortcutTask
    conditions: Conditions
    device: torch.device

    def moved(self, tensor: Tensor) -> Tensor:
        return self.mode.from_tensor(tensor).to(self.device)


def move(module: nn.Module, mode: FakeTensorMode, device: str) -> None:
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                fake: Tensor = mode.from_tensor(tensor).detach().to(device)
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake


def task_of(base: MaskedImageModel, network: ShortcutNetwork) -> ShortcutTask:
    """A task set up as by a trainer, which logs nothing."""
    decoding = asdict(DECODINGS["default"])
    card = SimpleNamespace(spec=base.spec._asdict(), decoding=decoding, num_steps=NUM_STEPS, base_fingerprint="")
    guided = network.options.guided
    data = SimpleNamespace(card=card, interface=base.interface, source="", window=1, max_gap=1, guided=guided)
    task = ShortcutTask(network, losses={"mse": MaskedMSE(), "all": MaskedMSE(rows="all"), "kl": HeadKL()})
    task.trainer = SimpleNamespace(  # type: ignore[assignment]
        datamodule=data, precision="32-true", world_size=1, current_epoch=0, global_step=0, log_every_n_steps=0
    )
    task.setup("fit")
    return task


@contextmanager
def fake(name: str, monkeypatch: pytest.MonkeyPatch, device: str = CUDA) -> Iterator[OnDevice]:
    case = CASES[name]
    base, network, conditions = case.make_base(), case.make_network(), case.conditions()
    task = task_of(base, network)
    for decoding in DECODINGS.values():  # what is computed once, on the CPU
        tokens_per_step(decoding.schedule, NUM_STEPS, base.spec.num_tokens)
    places = halton_order(*base.spec.grid)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        monkeypatch.setattr("lit_shortcut.sampling.halton_order", lambda height, width: mode.from_tensor(places))
        assert isinstance(base, nn.Module)
        for module in (base, network):
            move(module, mode, device)
        assert task.rollouts is not None
        task.rollouts.to(device)
        tensors = (mode.from_tensor(part).to(device) for part in conditions[:3])
        yield OnDevice(mode, base, network, task, Conditions(*tensors, conditions.prompts), torch.device(device))


RUNS = [(name, method, "default") for name in CASES for method in ("vanilla", "shortcut")]
RUNS += [("toy", "hold", decoding) for decoding in DECODINGS] + [("toy", "taylor", "default")]


@pytest.mark.parametrize(("name", "method", "decoding"), RUNS)
def test_the_loop_waits_for_nothing_and_copies_nothing_from_the_host(
    name: str, method: str, decoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake(name, monkeypatch) as on:
        run = sample(on.base, on.conditions, DECODINGS[decoding], accelerations(on.network)[method])
        next(run)
        for _ in range(1, NUM_STEPS):
            assert not launches_of(lambda: next(run)).reads


@pytest.mark.parametrize("decoding", ["default", "halton"])
@pytest.mark.parametrize("name", sorted({*CASES} - {"cross toy"}))  # whose encoder is a toy
def test_a_batch_begins_without_waiting_for_the_one_before(
    name: str, decoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake(name, monkeypatch) as on:
        run = sample(on.base, on.conditions, DECODINGS[decoding], accelerations(on.network)["shortcut"])
        assert not +launches_of(lambda: next(run)).waits


@pytest.mark.parametrize("name", CASES)
def test_recording_waits_for_nothing_and_images_are_decoded_on_the_device(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake(name, monkeypatch) as on:
        recorded = record(on.base, on.conditions, DECODINGS["default"])
        assert recorded.committed_at.device == recorded.tokens.device == on.device
        assert on.base.decode(recorded.tokens).device == on.device


class Later:
    """Stands in for a background thread, in which the fake device does not work: does its jobs when asked to."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = []

    def submit(self, job: Callable[..., Any], *arguments: Any) -> Future[Any]:
        self.jobs.append((Future(), job, arguments))
        return self.jobs[-1][0]

    def results(self, leave: int) -> list[Any]:
        return []

    def work(self) -> None:
        for future, job, arguments in self.jobs:
            future.set_result(job(*arguments))


def recording(on: OnDevice, kind: type[HostRoom], *arguments: Any) -> tuple[Future[Trajectories], Launches]:
    """The future of what is recorded, and what the main thread asks for from step 1 on."""
    launches = Launches()

    class Noted(kind):  # type: ignore[misc, valid-type]
        def put(self, target: Tensor, source: Tensor) -> None:
            super().put(target, source)
            if self.is_first:
                launches.reads.clear()
                self.is_first = False

    kept = Noted(*arguments, inf, Path("nowhere"))
    kept.is_first = True
    with launches:
        future = kept.finished(record(on.base, on.conditions, DECODINGS["default"], kept))
    return future, launches


@pytest.mark.parametrize("name", CASES)
def test_features_leave_the_device_while_nothing_waits_for_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake(name, monkeypatch) as on:
        later = Later()
        monkeypatch.setattr(room, "Background", lambda: later)
        monkeypatch.setattr(torch, "get_device_module", lambda device: torch.cpu)  # streams that are none
        future, launches = recording(on, HostRing, on.device)
        assert not launches.reads
        later.work()
        found = future.result()
        tensors = [found.features, found.tokens, found.committed_at, *found.conditions[:3], *(found.prefix or ())]
        assert {tensor.device for tensor in tensors} == {torch.device("cpu")}


def test_features_copied_without_the_ring_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake("toy", monkeypatch) as on:
        assert recording(on, HostRoom)[1].reads


def test_a_plan_that_reads_features_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake device does raise."""
    with fake("toy", monkeypatch) as on, pytest.raises(DataDependentOutputException):
        generate(on.base, on.conditions, DECODINGS["default"], Accelerated(Adaptive(0.1), Hold()))


def test_a_plan_that_decides_by_sample_computes_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake("toy", monkeypatch) as on:
        decide = Adaptive(0.1, "sample", max_gap=2).start([4] * NUM_STEPS, Hold())
        for step in sample(on.base, on.conditions, DECODINGS["default"], Vanilla()):
            latest = Past(step.features, [])
            assert {decide(latest, step.state).device for _ in range(2)} == {on.device}


def test_a_tensor_left_on_the_host_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake("toy", monkeypatch) as on:
        on.base.interface.head_bias = on.mode.from_tensor(torch.zeros(on.base.spec.codebook_size))
        with pytest.raises(RuntimeError, match=r"on the same device.*cuda:0 and cpu"):
            generate(on.base, on.conditions, DECODINGS["default"], Vanilla())


def trajectories(name: str) -> Trajectories:
    """Trajectories in the host's memory, whose values are known as in validation."""
    case = CASES[name]
    found = record(case.make_base(), case.conditions(), DECODINGS["default"])
    return apply_to_collection(found, Tensor, Tensor.clone)  # outside inference mode


def windows(name: str) -> Transition:
    """Windows of two targets, or gaps of one step and of two, as a loader makes them."""
    options, places = CASES[name].make_network().options, [(0, 0, 0), (1, 0, 0)]
    guidance = DECODINGS["default"].guidance_by_step if options.guided else None
    window, gaps = (1, [1, 2]) if options.anchored else (2, None)
    return select(trajectories(name), places, window, gaps, guidance)


@pytest.mark.parametrize("name", ["maskgit", "guided"])
def test_windows_of_a_pool_on_the_device_are_taken_by_indices_on_the_device(name: str) -> None:
    pool = trajectories(name)
    pool = pool._replace(features=pool.features.to(META))
    guidance = DECODINGS["default"].guidance_by_step if name == "guided" else None
    with Launches() as launches:
        batch = select(pool, [(0, 0, 0), (1, 0, 1)], guidance=guidance)
    assert batch.features.device.type == META
    assert not launches.reads["aten.index.Tensor"]  # an index on the host waits for all that the device has to do


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_training_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two predictions in a row, all losses, backward, and an optimiser's step.

    On ``meta``, which takes gradients without a driver; CUDA's autograd asks for one.
    """
    batch = windows(name)
    with fake(name, monkeypatch, META) as on:
        optimizer = torch.optim.AdamW(on.network.requires_grad_(True).parameters(), lr=1e-3)
        batch = apply_to_collection(batch, Tensor, on.moved)
        with Launches() as launches:
            loss = on.task.training_step(batch, DRAWS_DEPTH_2)
            loss.backward()
        optimizer.step()
        gradients = [parameter.grad for parameter in on.network.parameters()]
        assert {part.device for part in (loss, *gradients) if part is not None} == {on.device}
        assert not launches.reads


@pytest.mark.parametrize("name", CASES)
def test_validation_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trajectories(name)
    with fake(name, monkeypatch) as on:
        on.task.validation_step(found, 0)
        totals = [metric.total for metric in on.task.modules() if isinstance(metric, PlaceMean)]
        assert {total.device for total in totals} == {on.device}


def read_back(network: nn.Module, inputs: Any, output: Tensor) -> None:
    output.sum().item()


def test_a_network_that_reads_its_output_is_caught_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = windows("toy")
    with fake("toy", monkeypatch, META) as on:
        on.network.register_forward_hook(read_back)
        with pytest.raises(DataDependentOutputException):
            on.task.training_step(apply_to_collection(batch, Tensor, on.moved), 0)


def test_a_network_that_reads_its_output_is_caught_in_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trajectories("toy")
    with fake("toy", monkeypatch) as on:
        on.network.register_forward_hook(read_back)
        with pytest.raises(DataDependentOutputException):
            on.task.validation_step(found, 0)


def test_masked_tokens_counted_on_the_device_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = windows("toy")._replace(num_masked=())
    with fake("toy", monkeypatch, META) as on, pytest.raises(DynamicOutputShapeException):
        on.task.training_step(apply_to_collection(batch, Tensor, on.moved), 0)


class Cumsums(TorchDispatchMode):
    """Types of the tensors whose running sums are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.cumsum.default:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_sampling_takes_no_running_sums_of_floats(deterministic: bool) -> None:
    """CUDA has no deterministic kernel for them and raises."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        with FakeTensorMode(), Cumsums() as cumsums:
            choice = sample_codes(torch.randn(2, 3, 8, device=CUDA), torch.rand(2, 3, device=CUDA))
    finally:
        torch.use_deterministic_algorithms(False)
    assert choice.codes.shape == choice.log_probs.shape == (2, 3)
    assert cumsums.dtypes == [torch.int64 if deterministic else torch.float32]
