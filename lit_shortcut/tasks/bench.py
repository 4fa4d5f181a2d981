"""Profile of the decoding loop: ``test`` times it part by part."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import Conditions, MaskedImageModel
from lit_shortcut.evaluation.identity import dtype_of
from lit_shortcut.evaluation.rows import Row
from lit_shortcut.files import replacing
from lit_shortcut.metrics.latency import device_name
from lit_shortcut.metrics.parts import Laps, Part, TimedAcceleration, TimedBase, parts_of, summary
from lit_shortcut.sampling import sample
from lit_shortcut.tasks.comparison import ComparisonTask
from lit_shortcut.trials import is_trial, require_writable_file


class BenchTask(ComparisonTask):
    """Time of base, predictor, head, token choice and rest in each of ``rows``, on the first batch of the conditions.

    Rows are run in turns, round by round, after one run of each to warm up. ``test`` prints a table a row and writes
    all to one JSON file.

    Args:
        base: the frozen model.
        path: JSON file to write.
        rounds: timed runs of each row.
        **comparison: arguments of :class:`~lit_shortcut.tasks.comparison.ComparisonTask`.
    """

    def __init__(
        self,
        base: MaskedImageModel,
        *,
        path: Path = Path("runs/bench.json"),
        rounds: int = 3,
        **comparison: Any,
    ) -> None:
        super().__init__(base, **comparison)
        require_at_least(1, rounds=rounds)
        self.path, self.rounds = path, rounds

    def setup(self, stage: str) -> None:
        """Check up front that everything can be run and written."""
        super().setup(stage)
        require_writable_file(self.trainer, "test", self.path)

    def test_step(self, batch: Conditions, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure on the first batch; skip the others."""
        if batch_idx > 0 or dataloader_idx > 0:
            return
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for row in self.rows:
            self._run(row, batch)
        rounds = [[self._run(row, batch) for row in self.rows] for _ in range(self.rounds)]
        measured = {
            row.name: parts_of(list(laps)) for row, laps in zip(self.rows, zip(*rounds, strict=True), strict=True)
        }
        facts = self.facts(batch)
        said = ", ".join(f"{name} {value}" for name, value in facts.items())
        tables = "\n\n".join(f"{name}\n{_table(parts)}\n\n{summary(parts)}" for name, parts in measured.items())
        rank_zero_info(f"\n{tables}\n\n{said}")
        if self.trainer.is_global_zero and not is_trial(self.trainer, "test"):
            rows = {name: [part._asdict() for part in parts] for name, parts in measured.items()}
            with replacing(self.path) as aside:
                aside.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
            rank_zero_info(f"written to {self.path}")

    def facts(self, batch: Conditions) -> dict[str, Any]:
        """Return everything the figures depend on, and the peak of memory."""
        on_cuda = self.device.type == "cuda"
        return {
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "dtype": dtype_of(self.base),
            "precision": str(self.trainer.precision),
            "batch": len(batch.ids),
            "rounds": self.rounds,
            "weights": "random" if self.random_weights else "trained",
            "compiled": self.compiled,
            "torch": torch.__version__,
            "peak_memory_mb": round((torch.cuda.max_memory_allocated(self.device) if on_cuda else _peak_rss()) / 1e6),
            "memory": "allocated by torch on the device" if on_cuda else "resident, of the whole process",
        }

    def _run(self, row: Row, batch: Conditions) -> Laps:
        """Run the decoding loop once, in laps."""
        laps = Laps(self.device)
        base, method = TimedBase(self.base, laps), TimedAcceleration(row.acceleration, laps)
        laps.begin()
        for _ in sample(base, batch, row.decoding, method):
            laps.end("token choice", calls=1)
        laps.end("rest")
        return laps


def _table(parts: list[Part]) -> str:
    total = sum(part.ms for part in parts)
    lines = [
        [
            part.name,
            part.calls or "",
            f"{part.call_ms:.2f}" if part.calls else "",
            f"{part.ms:.1f}",
            f"{100 * part.share:.2f} %",
        ]
        for part in parts
    ]
    lines.append(["all", "", "", f"{total:.1f}", ""])
    columns = ["part", "calls", "ms a call", "ms a batch", "share"]
    text: str = pd.DataFrame(lines, columns=columns).to_markdown(index=False, disable_numparse=True)
    return text


def _peak_rss() -> int:
    """Return the peak in bytes; Linux counts in kB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
