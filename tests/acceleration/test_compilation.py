from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from lit_shortcut.acceleration import compilation
from lit_shortcut.acceleration.accelerated import Accelerated
from lit_shortcut.acceleration.compilation import compile_networks, require_compiler
from lit_shortcut.acceleration.plans import Adaptive, Even
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.networks.shortcut import ShortcutNetwork
from lit_shortcut.sampling import Decoding, generate
from tests.gpu.cases import CASES

DECODING = Decoding(num_steps=5)
WHOLE: list[tuple[str, compilation.Mode]] = [(n, "reduce-overhead" if n == "maskgit" else "default") for n in CASES]


@pytest.fixture
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured, whole or not at all, and run as they are: no compiler takes part."""
    monkeypatch.setattr(compilation, "require_compiler", lambda device: None)
    capture = torch.compile

    def without_mode(function: Callable[..., Any], *, mode: str, **settings: Any) -> Any:
        return capture(function, backend="eager", **settings)

    monkeypatch.setattr(torch, "compile", without_mode)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.usefixtures("eager_backend")
@pytest.mark.parametrize(("name", "mode"), WHOLE)
def test_base_and_shortcut_of_every_kind_are_captured_whole(name: str, mode: compilation.Mode) -> None:
    case = CASES[name]
    base, conditions = case.make_base(), case.conditions()
    method = Accelerated(Even(2), Shortcut(case.make_network()))
    expected = generate(base, conditions, DECODING, method).tokens
    compile_networks(base, [method], mode)
    counters = torch._dynamo.utils.counters
    assert torch.equal(generate(base, conditions, DECODING, method).tokens, expected)
    assert (graphs := counters["stats"]["unique_graphs"]) >= 2  # base and network
    generate(base, conditions._replace(seeds=conditions.seeds + 50), DECODING, method)
    assert counters["stats"]["unique_graphs"] == graphs  # those of the first batch serve all
    assert not counters["graph_break"]


@pytest.mark.usefixtures("eager_backend")
def test_several_networks_run_at_several_batch_sizes() -> None:
    names = ["maskgit", "masked rows", "guided"]
    base = CASES["maskgit"].make_base()
    methods = [Accelerated(Even(2), Shortcut(CASES[name].make_network())) for name in names]
    decoding = Decoding(num_steps=8)
    expected = [generate(base, CASES["maskgit"].conditions(2), decoding, method).tokens for method in methods]
    compile_networks(base, methods)
    for count in (2, 3, 1):
        for method, tokens in zip(methods, expected, strict=True):
            drawn = generate(base, CASES["maskgit"].conditions(count), decoding, method).tokens
            assert torch.equal(drawn[:2], tokens[:count])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs the compiler g++ on CPUs")
def test_compiled_networks_give_the_same_tokens_under_the_same_names() -> None:
    case = CASES["toy"]
    base, network = ToyBase(), case.make_network()
    method = Accelerated(Even(2), Shortcut(network))
    names, identity = list(network.state_dict()), method.identity()
    run = partial(generate, base, case.conditions(), Decoding(num_steps=3), method)
    expected = run().tokens
    compile_networks(base, [method])
    compiled = base.features
    compile_networks(base, [method])  # as a second test or generate of the same task does
    assert base.features is compiled
    assert torch.equal(run().tokens, expected)
    assert (list(network.state_dict()), method.identity()) == (names, identity)


@pytest.mark.parametrize("name", ["maskgit", "dimoo"])
def test_shortcut_networks_of_every_kind_are_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(compilation, "require_compiler", lambda device: None)
    compile_in_place = ShortcutNetwork.compile

    def compile_and_note(module: ShortcutNetwork, **settings: Any) -> None:
        compiled.append(module)
        compile_in_place(module, **settings)

    monkeypatch.setattr(ShortcutNetwork, "compile", compile_and_note)
    network = CASES[name].make_network()
    compile_networks(ToyBase(), [Accelerated(Even(2), Shortcut(network))])
    assert compiled == [network]


# ---- bad input


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(ValueError, match=r"compiled: true.*no-such-compiler -O2 was not found"):
        compile_networks(ToyBase(), [])
    monkeypatch.setattr(compilation, "has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"compiled: true.*triton"):
        require_compiler(torch.device("cuda"))
    monkeypatch.setattr(compilation, "has_triton", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"compiled: true.*a C compiler on a GPU.*gcc nor clang"):
        require_compiler(torch.device("cuda"))


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_graph_mode_refuses_a_plan_that_decides_from_the_features(per: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "require_compiler", lambda device: None)
    base = ToyBase()
    with pytest.raises(ValueError, match=r"compile_mode: reduce-overhead.*Adaptive decides from the features"):
        compile_networks(base, [Accelerated(Adaptive(0.1, per), Hold())], "reduce-overhead")
    assert "features" not in vars(base)  # nothing was compiled
