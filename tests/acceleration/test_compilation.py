from __future__ import annotations

import shutil

import pytest
import torch

from lit_shortcut.acceleration.accelerated import Accelerated
from lit_shortcut.acceleration.compilation import compile_networks
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.contracts import Conditions
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.networks.shortcut import ShortcutNet, ShortcutNetwork
from lit_shortcut.sampling import Decoding, generate


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs the compiler g++ on CPUs")
def test_compiled_networks_give_the_same_tokens_under_the_same_names() -> None:
    ids = torch.arange(3)
    conditions, decoding = Conditions(ids, ids + 5, ids), Decoding(num_steps=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ShortcutNet(width=16, num_heads=2).eval().requires_grad_(False)
        torch.nn.init.normal_(network.widen.weight, std=0.1)
    base, method = ToyBase(), Accelerated(Even(2), Shortcut(network))
    names, identity = list(network.state_dict()), method.identity()
    expected = generate(base, conditions, decoding, method).tokens
    compile_networks(base, [method])
    torch._dynamo.utils.counters.clear()
    assert torch.equal(generate(base, conditions, decoding, method).tokens, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # both were compiled
    assert (list(network.state_dict()), method.identity()) == (names, identity)


@pytest.mark.parametrize(
    "network",
    [ShortcutNet(16, num_heads=2), LLaDAShortcutNet(16, num_heads=2, mlp_width=8)],
    ids=lambda n: type(n).__name__,
)
def test_shortcut_networks_of_every_kind_are_compiled(
    network: ShortcutNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.nn.Module] = []

    def compile_in_place(module: torch.nn.Module) -> None:
        compiled.append(module)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_in_place)
    compile_networks(ToyBase(), [Accelerated(Even(2), Shortcut(network))])
    assert compiled == [network]
