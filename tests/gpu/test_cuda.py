"""What only a device can show; ``pytest -m gpu`` runs these where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torch.utils._triton import has_triton

from datamodules.copying import CopyStream, begun_ahead
from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.compilation import compile_networks
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.contracts import Conditions, MaskedImageModel
from lit_shortcut.metrics.functional import masked_mse
from lit_shortcut.networks.shortcut import ShortcutNetwork
from lit_shortcut.sampling import Decoding, generate, sample
from lit_shortcut.tasks.recording import record
from tests.gpu.cases import CASES, accelerations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]
CUDA = torch.device("cuda", 0)
GREEDY = Decoding(num_steps=6, temperature=0.0, confidence_noise=0.0)
NOISY = Decoding(num_steps=6)


def on_cuda(name: str) -> tuple[MaskedImageModel, ShortcutNetwork, Conditions]:
    case = CASES[name]
    base, network = case.make_base(), case.make_network()
    assert isinstance(base, nn.Module)
    base.to(CUDA)
    conditions: Conditions = move_data_to_device(case.conditions(), CUDA)
    return base, network.to(CUDA), conditions


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CASES)
def test_greedy_runs_draw_the_tokens_of_the_cpu(name: str) -> None:
    case = CASES[name]
    base, network, conditions = on_cuda(name)
    expected = accelerations(case.make_network())
    for method, acceleration in accelerations(network).items():
        on_cpu = generate(case.make_base(), case.conditions(), GREEDY, expected[method]).tokens
        assert torch.equal(generate(base, conditions, GREEDY, acceleration).tokens.cpu(), on_cpu)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("no_synchronisation")
def test_no_step_waits_for_the_device(name: str) -> None:
    base, network, conditions = on_cuda(name)
    for acceleration in accelerations(network).values():
        generate(base, conditions, NOISY, acceleration)  # first calls load kernels
        run = sample(base, conditions, NOISY, acceleration)
        next(run)
        torch.cuda.set_sync_debug_mode("error")
        for _ in run:
            pass
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["maskgit", "dimoo, padded"])
@pytest.mark.usefixtures("deterministic")
def test_deterministic_runs_draw_the_same_tokens_again(name: str) -> None:
    base, network, conditions = on_cuda(name)
    acceleration = accelerations(network)["shortcut"]
    first, second = (generate(base, conditions, NOISY, acceleration).tokens for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.skipif(not has_triton(), reason="needs triton to compile")
@pytest.mark.parametrize("name", ["maskgit", "dimoo, padded"])
def test_replayed_graphs_draw_the_same_tokens_batch_after_batch(name: str) -> None:
    base, network, conditions = on_cuda(name)
    method = Accelerated(Even(2), Shortcut(network))
    batches = [conditions, conditions._replace(seeds=conditions.seeds + 50)]
    expected = [generate(base, batch, GREEDY, method).tokens for batch in batches]
    compile_networks(base, [method], "reduce-overhead")
    for _ in range(3):  # graphs are recorded in the first rounds and replayed in the last
        for batch, tokens in zip(batches, expected, strict=True):
            assert torch.equal(generate(base, batch, GREEDY, method).tokens, tokens)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def test_more_steps_take_no_more_memory_than_their_noise() -> None:
    base, network, _ = on_cuda("maskgit")
    conditions: Conditions = move_data_to_device(CASES["maskgit"].conditions(512), CUDA)
    features = 4 * 2 * 512 * base.interface.num_rows * base.spec.width  # bytes of one step, of both branches

    def peak(num_steps: int) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        generate(base, conditions, NOISY.at(num_steps), Accelerated(Even(2), Shortcut(network)))
        return torch.cuda.max_memory_allocated() - before

    peak(4)
    noise = 2 * 4 * len(conditions.ids) * base.spec.num_tokens * 6  # bytes of six more steps
    assert peak(10) <= peak(4) + noise + features // 2  # blocks are rounded up


@pytest.mark.parametrize("name", CASES)
def test_recorded_features_are_those_of_the_loop_byte_for_byte(name: str) -> None:
    base, _, conditions = on_cuda(name)
    recorded = record(base, conditions, NOISY)
    for index, step in enumerate(sample(base, conditions, NOISY, Vanilla())):
        assert torch.equal(recorded.features[:, :, index].cpu(), step.features.transpose(0, 1).cpu())
    assert torch.equal(recorded.tokens.cpu(), step.tokens.cpu())


def test_batches_are_whole_though_the_device_is_busy_while_they_are_copied() -> None:
    expected = [
        torch.randn(64, 2, 1025, 768, generator=torch.Generator().manual_seed(k)).pin_memory() for k in range(4)
    ]
    copies, found = CopyStream(CUDA), []
    for batch in begun_ahead(expected, copies.begin, copies.finish):
        torch.cuda._sleep(10**8)
        found.append(batch * 1.0)
        del batch  # its memory may be given to the next copy, but not before the product is there
    for own, copied in zip(expected, found, strict=True):
        assert torch.equal(own, copied.cpu())


def test_one_training_step_moves_the_weights_as_on_the_cpu() -> None:
    base, network, conditions = on_cuda("maskgit")
    first, second = list(sample(base, conditions, GREEDY, Vanilla()))[:2]
    control = base.interface.embed(first.committed.tokens, first.committed.positions)
    features, targets = first.features[0].clone(), second.features[0].clone()
    masked, share = second.state.tokens == base.spec.mask_id, second.state.masked_share.clone()
    moved = []
    for device in (CUDA, torch.device("cpu")):
        trained = deepcopy(network).to(device).requires_grad_(True)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        here, after, by, r, where = (part.clone().to(device) for part in (features, targets, control, share, masked))
        masked_mse(trained(here, by, r), after, where).backward()
        optimizer.step()
        moved.append([parameter.detach().cpu() for parameter in trained.parameters()])
    for ours, theirs in zip(*moved, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
