"""States of a row's metrics, saved to disk batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import Metric

from lit_shortcut.contracts import Conditions
from lit_shortcut.evaluation.drawing import Drawn
from lit_shortcut.evaluation.identity import differences
from lit_shortcut.metrics.images import ImageMetric, collection
from lit_shortcut.weights import WeightsError, load_tensors, save_tensors

_UPDATES = "updates"


class FullSteps(Metric):
    """Number of base passes per image: mean, and 5 % and 95 % quantiles.

    Args:
        num_steps: N, the largest possible number.
    """

    counts: Tensor
    full_state_update = False

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(num_steps + 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, full_steps: Tensor) -> None:
        """Add the numbers of base passes (B,) of some images."""
        self.counts = self.counts + torch.bincount(full_steps.to(self.counts), minlength=len(self.counts))

    def compute(self) -> dict[str, float]:
        """Return ``mean``, ``low`` (5 %) and ``high`` (95 %)."""
        counts = self.counts.cpu().double()
        passes = torch.arange(len(counts)).double()
        below = counts.cumsum(0) / counts.sum()
        low, high = (int((below >= share - 1e-9).nonzero()[0]) for share in (0.05, 0.95))
        return {"mean": float((passes * counts).sum() / counts.sum()), "low": low, "high": high}


class Tally:
    """Metrics of one row at one run seed, on one rank.

    With a ``path``, their states are saved after each batch, so that a killed run resumes with the next batch and ends
    with bit-identical values. What a batch adds to states that are lists is saved in a file of its own.

    Args:
        metrics: image metrics by name; the row gets copies.
        num_steps: N of the row.
        device: device of the metrics' states.
        path: file of the states; None keeps them in memory only.
        key: everything the states depend on; a file with another key is ignored, and the log says why.
    """

    def __init__(
        self,
        metrics: Mapping[str, ImageMetric],
        num_steps: int,
        device: torch.device,
        path: Path | None = None,
        key: dict[str, Any] | None = None,
    ) -> None:
        self.metrics = collection(deepcopy(dict(metrics))).to(device)
        self.full_steps, self.path, self.key = FullSteps(num_steps).to(device), path, key
        self.parts: dict[str, Metric] = {"full_steps": self.full_steps}
        for first, *_ in self.metrics.compute_groups.values():  # the others share its states
            part = getattr(self.metrics, first)  # indexing would return a copy
            assert isinstance(part, Metric)
            self.parts[f"metrics/{first}"] = part
        self.names, self.batches = list(metrics), 0
        if path is not None and path.exists():
            self._resume(path)

    def add(self, drawn: Drawn, conditions: Conditions, vanilla: Drawn | None = None) -> None:
        """Add one batch, with what ``vanilla`` drew if a metric compares with it, and save the states."""
        known = {name: len(elements) for name, elements in self._lists().items()}
        self.metrics.update(drawn.images, conditions, originals=vanilla.images if vanilla else None)
        self.full_steps.update(drawn.full_steps)
        gained = {
            f"{name}/{index}": element
            for name, elements in self._lists().items()
            for index, element in enumerate(elements[known[name] :], start=known[name])
        }
        if self.path is not None:
            if gained:
                save_tensors(self._batch_path(self.path, self.batches), _on_cpu(gained), {})
            save_tensors(self.path, _on_cpu(self._tensors()), {"batches": self.batches + 1, "key": self.key})
        self.batches += 1

    def compute(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the values of the metrics and the base passes over all ranks, which must call it in the same order."""
        values = {name: float(value) for name, value in self.metrics.compute().items()}
        return {name: values[name] for name in self.names}, self.full_steps.compute()

    def drop(self) -> None:
        """Delete the files."""
        if self.path is not None:
            for index in range(self.batches):
                self._batch_path(self.path, index).unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)

    def _resume(self, path: Path) -> None:
        try:
            tensors, kept = load_tensors(path)
            if changes := differences(kept.get("key"), self.key):
                rank_zero_info(f"{path}: ignored, since {'; '.join(changes)}")
                return
            for index in range(kept["batches"]):
                if (batch := self._batch_path(path, index)).exists():
                    tensors |= load_tensors(batch)[0]
            self._restore(tensors)
        except (WeightsError, KeyError) as error:
            rank_zero_info(f"{path}: ignored, it cannot be read ({error})")
            for part in self.parts.values():
                part.reset()
            return
        self.batches = kept["batches"]
        rank_zero_info(f"{path}: resumed after {self.batches} finished batches")

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        for where, part in self.parts.items():
            part._update_count = int(tensors[f"{where}/{_UPDATES}"])  # otherwise compute warns of missing updates
            for name, value in part.metric_state.items():
                if isinstance(value, Tensor):
                    setattr(part, name, tensors[f"{where}/{name}"].to(part.device))
                    continue
                while (element := tensors.get(f"{where}/{name}/{len(value)}")) is not None:
                    value.append(element.to(part.device))

    def _tensors(self) -> dict[str, Tensor]:
        states = {}
        for where, part in self.parts.items():
            states[f"{where}/{_UPDATES}"] = torch.tensor(part.update_count)
            for name, value in part.metric_state.items():
                if isinstance(value, Tensor):
                    states[f"{where}/{name}"] = value
        return states

    def _lists(self) -> dict[str, list[Tensor]]:
        return {
            f"{where}/{name}": value
            for where, part in self.parts.items()
            for name, value in part.metric_state.items()
            if isinstance(value, list)
        }

    @staticmethod
    def _batch_path(path: Path, index: int) -> Path:
        return path.with_suffix(f".batch{index:06d}.safetensors")


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
