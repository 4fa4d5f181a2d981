"""``torch.compile`` of the base's pass and the predictors' networks."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._triton import has_triton

from lit_shortcut.acceleration.accelerated import reads_features
from lit_shortcut.contracts import MaskedImageModel
from lit_shortcut.networks.shortcut import ShortcutNetwork

Mode = Literal["default", "reduce-overhead"]
_MOST_GRAPHS = 128


def compile_networks(base: MaskedImageModel, methods: Iterable[nn.Module], mode: Mode = "default") -> None:
    """Compile ``base.features`` and every shortcut network among ``methods``, in place, each as one graph.

    Weights, their names and fingerprints do not change. The first images wait for the compiler; the number of control
    tokens changes from step to step and is compiled as a variable. What was compiled before stays as it is.

    Args:
        base: the frozen model.
        methods: ways to decode.
        mode: ``reduce-overhead`` replays CUDA graphs, one for each shape. The shapes of a step are the same in every
            batch, so the graphs of the first batch serve a whole run; this needs plans that are fixed beforehand.

    Raises:
        ValueError: if there is no compiler for the device, or a plan decides from features in graph mode.
    """
    methods = list(methods)
    # dynamo counts the graphs of all networks of a class together, and gives up at 8
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    require_compiler(base.interface.code_embedding.device)
    if mode == "reduce-overhead":
        require_fixed_plans(methods)
        torch._inductor.config.triton.cudagraph_dynamic_shape_warn_limit = None  # a graph for each step is meant
    finish = _kept if mode == "reduce-overhead" else _as_it_is
    if "features" not in vars(base):  # which shadows the method once it is compiled
        base.features = finish(torch.compile(base.features, fullgraph=True, mode=mode))  # type: ignore[method-assign]
    for method in methods:
        for module in method.modules():
            if isinstance(module, ShortcutNetwork) and not getattr(module, "_compiled_call_impl", None):
                module.compile(fullgraph=True, mode=mode)
                assert module._compiled_call_impl is not None
                module._compiled_call_impl = finish(module._compiled_call_impl)


def require_compiler(device: torch.device) -> None:
    """Check that the compiler torch needs for ``device`` is installed.

    Raises:
        ValueError: naming the missing compiler.
    """
    if device.type == "cuda":
        if not has_triton():
            raise ValueError(
                "compiled: true needs the package triton on a GPU, and it was not found; set compiled: false"
            )
        if not any(map(shutil.which, [os.environ.get("CC", "gcc"), "clang"])):
            raise ValueError(
                "compiled: true needs a C compiler on a GPU, for triton, and neither gcc nor clang was found; set "
                "compiled: false, or CC to the name of a compiler"
            )
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and not shutil.which(compiler.split()[0]):
        raise ValueError(
            f"compiled: true needs a C++ compiler on a CPU, and {compiler} was not found; set compiled: false, or CXX "
            "to the name of a compiler"
        )


def require_fixed_plans(methods: Iterable[nn.Module]) -> None:
    """Check that no plan depends on features, for graph mode.

    Raises:
        ValueError: naming the plan that does.
    """
    for method in methods:
        if reads_features(method):
            raise ValueError(
                "compile_mode: reduce-overhead replays the same steps in every batch, but "
                f"{type(method.plan).__name__} decides from the features which steps are full; "
                "set compile_mode: default, or use a fixed plan"
            )


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``function`` to copy its results, since a replayed graph writes to the same memory again."""

    @wraps(function)
    def copied(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return function(*args, **kwargs).clone()

    return copied
