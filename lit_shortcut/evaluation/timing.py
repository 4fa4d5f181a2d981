"""Latency of rows, also in units of one base pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_shortcut.contracts import Clock, Conditions, MaskedImageModel
from lit_shortcut.evaluation.rows import Row
from lit_shortcut.metrics.latency import measure_latency, ratio
from lit_shortcut.sampling import Decoding, generate

_BASE = "passes of the base"
UNIT_PASSES = 4  # timed in a row as the unit of cost: a single one is short, and differs more from round to round


def time_rows(
    base: MaskedImageModel, rows: Sequence[Row], decoding: Decoding, conditions: Conditions, rounds: int
) -> dict[str, dict[str, Any]]:
    """Time each row's decoding loop in turns, without the image decoder, synchronised and after a warm-up.

    Args:
        base: the frozen model.
        rows: ways to decode.
        decoding: decides whether the base pass used as unit is guided.
        conditions: conditions of the images, on the device to measure.
        rounds: number of timed runs of each row.

    Returns:
        By row name the fields of :class:`~lit_shortcut.metrics.latency.Latency`, ``passes`` (the median over rounds in
        base passes of the same round), and on a GPU ``memory_mb``, the peak of allocated memory (10⁶ bytes).
    """
    device, batch_size = conditions.seeds.device, len(conditions.ids)
    rank_zero_info(f"timing {len(rows)} rows, {rounds} rounds in turns")
    runs: dict[str, Callable[[], object]] = {
        row.name: partial(generate, base, conditions, row.decoding, row.acceleration) for row in rows
    }
    memory = {name: _peak_mb(run, device) for name, run in runs.items()}
    runs[_BASE] = _base_passes(base, decoding, conditions)
    report = lambda done: rank_zero_info(f"timed {done} of {rounds} rounds")  # noqa: E731
    latencies = measure_latency(runs, device, batch_size, rounds, after_round=report)
    unit = latencies.pop(_BASE).round_ms
    return {
        name: latency._asdict() | {"passes": UNIT_PASSES * ratio(latency.round_ms, unit)} | memory[name]
        for name, latency in latencies.items()
    }


def _base_passes(base: MaskedImageModel, decoding: Decoding, conditions: Conditions) -> Callable[[], object]:
    shape = (len(conditions.ids), base.spec.num_tokens)
    tokens = torch.full(shape, base.spec.mask_id, device=conditions.seeds.device)
    context = base.context(conditions, guided=decoding.is_guided)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(UNIT_PASSES):
            base.features(tokens, context, Clock(0, decoding.num_steps))

    return run


def _peak_mb(run: Callable[[], object], device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return {"memory_mb": round(torch.cuda.max_memory_allocated(device) / 1e6)}
