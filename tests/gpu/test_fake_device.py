"""Everything runs on a GPU that isn't there: a fake device raises at every value read back and at every mix of devices.

Shapes, types and devices of all tensors are computed, their values are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.plans import Adaptive
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.contracts import Clock, Conditions, Control, MaskedImageModel, Trajectories
from lit_shortcut.decoding.halton import halton_order
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.decoding.unmasking import sample_codes
from lit_shortcut.losses import HeadKL, masked_tokens
from lit_shortcut.metrics.functional import head_kl, masked_cosine, masked_mean, masked_mse, token_agreement
from lit_shortcut.networks.control import advance, lay_out_branches
from lit_shortcut.networks.shortcut import ShortcutNetwork
from lit_shortcut.sampling import Decoding, generate, sample
from lit_shortcut.tasks import room
from lit_shortcut.tasks.recording import record
from lit_shortcut.tasks.room import HostRing, HostRoom
from tests.gpu.cases import CASES, accelerations
from tests.gpu.launches import Launches, launches_of

NUM_STEPS, CUDA = 3, "cuda:0"
META = "meta"  # takes gradients without a driver, too; CUDA's autograd asks for one
DECODINGS = {
    "default": Decoding(NUM_STEPS),
    "unguided": Decoding(NUM_STEPS, guidance=0.0, temperature=0.7),
    "halton": Decoding(NUM_STEPS, order="halton_rolled"),
}


class OnDevice(NamedTuple):
    """A case with all its tensors on the fake device, and the mode that computes with them."""

    mode: FakeTensorMode
    base: MaskedImageModel
    network: ShortcutNetwork
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


@contextmanager
def fake(name: str, monkeypatch: pytest.MonkeyPatch, device: str = CUDA) -> Iterator[OnDevice]:
    case = CASES[name]
    base, network, conditions = case.make_base(), case.make_network(), case.conditions()
    for decoding in DECODINGS.values():  # what is computed once, on the CPU
        tokens_per_step(decoding.schedule, NUM_STEPS, base.spec.num_tokens)
    places = halton_order(*base.spec.grid)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        monkeypatch.setattr("lit_shortcut.sampling.halton_order", lambda height, width: mode.from_tensor(places))
        assert isinstance(base, nn.Module)
        for module in (base, network):
            move(module, mode, device)
        tensors = (mode.from_tensor(part).to(device) for part in conditions[:3])
        yield OnDevice(mode, base, network, Conditions(*tensors, conditions.prompts), torch.device(device))


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


def test_a_tensor_left_on_the_host_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake("toy", monkeypatch) as on:
        on.base.interface.head_bias = on.mode.from_tensor(torch.zeros(on.base.spec.codebook_size))
        with pytest.raises(RuntimeError, match=r"on the same device.*cuda:0 and cpu"):
            generate(on.base, on.conditions, DECODINGS["default"], Vanilla())


def one_step(on: OnDevice, is_masked: Tensor) -> tuple[Tensor, Tensor]:
    """Features before a step and the network's prediction of those after it, of the conditional branch."""
    base, network = on.base, on.network
    context = base.context(on.conditions, guided=False)
    codes = on.moved(torch.randint(base.spec.codebook_size, (2, base.spec.num_tokens)))
    layout = next(iter(lay_out_branches(network, base.interface, context)), None)
    features = base.features(codes, context, Clock(0, NUM_STEPS))[0]
    share = on.moved(torch.tensor([0.5, 0.5]))
    control, gap = Control(codes[:, :3], codes[:, :3]), share if network.options.anchored else None
    return features, advance(network, base.interface, features, control, share, layout, masked=is_masked, gap=gap)


@pytest.mark.parametrize("name", CASES)
def test_the_network_trains_and_is_validated_without_waiting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, losses over masked places, backward, and an optimiser's step."""
    with fake(name, monkeypatch, META) as on:
        optimizer = torch.optim.AdamW(on.network.requires_grad_(True).parameters(), lr=1e-3)
        is_masked = on.moved(torch.rand(2, on.base.spec.num_tokens) < 0.5)
        rows = on.base.interface.masked_rows(is_masked)
        features, predicted = one_step(on, is_masked)
        loss = masked_mse(predicted, features, rows) + masked_cosine(predicted, features, rows)
        tokens = masked_tokens(is_masked, is_masked.shape[1])
        loss = loss + HeadKL()(predicted, features, tokens, on.base.interface)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            target, guess = (on.base.interface.logits(rows) for rows in one_step(on, is_masked))
            measured = masked_mean(head_kl(target, guess), is_masked), token_agreement(guess, target, is_masked)
        assert {part.device for part in (loss, *measured)} == {on.device}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_the_head_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake(name, monkeypatch) as on, torch.no_grad():
        is_masked = on.moved(torch.rand(2, on.base.spec.num_tokens) < 0.5)
        features, predicted = one_step(on, is_masked)
        with Launches() as launches:
            tokens = masked_tokens(is_masked, count=5)
            loss = HeadKL()(predicted, features, tokens, on.base.interface)
        assert loss.device == on.device
        assert not launches.reads
        with pytest.raises(DynamicOutputShapeException):
            masked_tokens(is_masked, None)


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
