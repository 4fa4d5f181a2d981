"""``python -m benchmarks.forecast``: operations and memory of runs at published size, counted without weights."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lit_shortcut.acceleration.accelerated import Accelerated, Predictor, Vanilla
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.bounds import require_in_steps
from lit_shortcut.contracts import Acceleration, Conditions, MaskedImageModel
from lit_shortcut.files import replacing
from lit_shortcut.sampling import Decoding, generate


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors made within it and alive now (``live``), and the most there have been (``peak``).

    Works on every device, the meta device included. Memory that an operation takes only while it runs is not seen.

    >>> with LiveMemory() as memory:
    ...     kept = torch.zeros(256, device="meta") + 1
    >>> memory.live, memory.peak
    (1024, 2048)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not say what it takes
        self.live = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and count the storages it made, not those of its arguments, which views share."""
        kwargs = kwargs or {}
        seen = _storages((args, kwargs))
        made = func(*args, **kwargs)
        for key, storage in _storages(made).items():
            if key not in seen:
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return made

    def _free(self, size: int) -> None:
        self.live -= size


def forecast(
    base: MaskedImageModel,
    predictor: Predictor,
    budgets: list[int],
    prompt: str = "",
    decoding: Decoding | None = None,
    path: Path = Path("runs/forecast.json"),
) -> dict[str, Any]:
    """Print what one image costs by vanilla and by each budget, and write it to a JSON file.

    Operations are those of matrix products. Activations are the tensors alive at once; the image decoder is left out.
    ``make report BASE=dimoo WEIGHTS=random`` measures the time of the same runs on a device that holds the base.

    Args:
        base: of published size, on the meta device, where nothing is computed.
        predictor: stands in for the base, at published size.
        budgets: b of the runs compared with vanilla.
        prompt: for bases that take prompts.
        decoding: how tokens are drawn, and N.
        path: JSON file to write.

    Raises:
        ValueError: if ``base`` has weights, or a budget lies outside 1..N.
    """
    decoding = decoding or Decoding()
    for budget in budgets:
        require_in_steps(decoding.num_steps, budgets=budget)
    assert isinstance(base, nn.Module)
    if not all(parameter.is_meta for parameter in base.parameters()):
        raise ValueError("base must be built on the meta device, so that nothing is computed")
    stand_in = copy.deepcopy(predictor)
    if isinstance(stand_in, nn.Module):
        stand_in.to("meta", base.interface.code_embedding.dtype)
    one = torch.zeros(1, dtype=torch.long, device="meta")
    conditions = Conditions(one, one, one, (prompt,) if prompt else ())
    name, num_steps = predictor.identity()["method"], decoding.num_steps
    methods: list[tuple[Any, int, Acceleration]] = [("vanilla", num_steps, Vanilla())]
    methods += [(name, budget, Accelerated(Even(budget), stand_in)) for budget in budgets]
    runs, peak = [], 0
    for method, budget, acceleration in methods:
        with FlopCounterMode(display=False) as counter, LiveMemory() as memory:
            generate(base, conditions, decoding, acceleration)
        peak = max(peak, memory.peak)
        runs.append({"method": method, "budget": budget, "operations": counter.get_total_flops()})
    counted = {"base": _num_bytes(base), "predictor": _num_bytes(stand_in), "activations": peak}
    found = {"num_steps": num_steps, "runs": runs, "memory_bytes": counted}
    with replacing(path) as aside:
        aside.write_text(json.dumps(found, indent=1) + "\n")
    print(described(found))  # noqa: T201 - what the command is for
    return found


def described(found: dict[str, Any]) -> str:
    """What :func:`forecast` found, as Markdown tables."""
    vanilla = found["runs"][0]["operations"]
    runs = [
        [run["method"], run["budget"], f"{run['operations'] / 1e12:.4g}", f"{vanilla / run['operations']:.2f}"]
        for run in found["runs"]
    ]
    taken = found["memory_bytes"] | {"all": sum(found["memory_bytes"].values())}
    tables = (
        pd.DataFrame(runs, columns=["method", "b", "TFLOP an image", "times fewer"]),
        pd.DataFrame([[name, f"{size / 1e9:.4g}"] for name, size in taken.items()], columns=["memory", "GB"]),
    )
    return "\n\n".join(table.to_markdown(index=False, disable_numparse=True) for table in tables)


def _num_bytes(module: object) -> int:
    return sum(parameter.nbytes for parameter in module.parameters()) if isinstance(module, nn.Module) else 0


def _storages(tree: object) -> dict[int, torch.UntypedStorage]:
    storages = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {id(storage): storage for storage in storages}


if __name__ == "__main__":
    auto_cli(forecast, as_positional=False)
