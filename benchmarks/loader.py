"""Pairs per second out of shards at the size of MaskGIT at 512×512, against the way of the MIGM-Shortcut release."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, count, pairwise
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from webdataset import WebDataset, filters

from benchmarks.table import Table
from datamodules.loading import EpochLoader
from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.contracts import Conditions, TokenSpec, Trajectories
from lit_shortcut.interface import TokenInterface
from lit_shortcut.metrics.latency import measure_latency
from lit_shortcut.trajectory import FORMAT_VERSION, Card, write_shard
from lit_shortcut.trajectory.interface_file import interface_fingerprint, save_interface
from lit_shortcut.trajectory.transitions import EncodedTransition

SPEC = TokenSpec(1024, 1025, 768, 1024, 1024, 1000)
NUM_STEPS = 15
NUM_SHARDS, ROWS = 5, 4  # branches to train on: 16; the last shard is kept for validation
BUFFER = 500  # pairs, of the release
PAIRS = 64  # taken by each timed call; a batch of ours
ROUNDS = 5
REFERENCES = {"reference, by a worker process": 1, "reference, in the process": 0}
AHEAD = "int8, 2 threads"


def measure() -> Table:
    """Write the same kind of data in both ways, and read it in turns."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sizes = {dtype: _write_set(folder / dtype, dtype) for dtype in ("int8", "bfloat16")}
        sizes["reference"] = _write_reference(folder / "reference.tar")
        tar = folder / "reference.tar"
        memory = {dtype: _memory_apart(_batches, folder / dtype, 6) for dtype in ("int8", "bfloat16")}
        memory["reference"] = _memory_apart(_reference, tar, PAIRS)
        memory[AHEAD] = _memory_apart(_ahead, folder / "int8", 6)
        ours = {dtype: _batches(folder / dtype) for dtype in ("int8", "bfloat16")}
        own: dict[str, Callable[[], object]] = {
            "bfloat16": lambda: next(ours["bfloat16"]),
            "int8": lambda: next(ours["int8"]),
            "int8, decoded on this CPU": lambda: next(ours["int8"]).decode(),
        }
        ahead = _ahead(folder / "int8")
        rates = {}
        for name, num_workers in REFERENCES.items():  # one after the other: the buffer of each takes 3 GB
            pairs = _reference(tar, num_workers)
            runs = {name: partial(_take, pairs, PAIRS)} | own
            measured = measure_latency(runs, torch.device("cpu"), PAIRS, ROUNDS)
            del pairs, runs
            epoch = {AHEAD: partial(_take, ahead, len(ahead))}  # not in turns: threads would read in those of others
            measured |= measure_latency(epoch, torch.device("cpu"), len(ahead) * PAIRS, ROUNDS)
            rates[name] = {way: 1000 / latency.median_ms for way, latency in measured.items()}
    rows: list[dict[str, Any]] = []
    for reference, found in rates.items():
        for way, rate in found.items():
            kind = way.partition(",")[0]
            rows.append(
                {
                    "way": way,
                    "pairs/s": rate,
                    "times the reference": rate / found[reference],
                    "MB a trajectory branch": sizes[kind] / 1e6,
                    "memory, MB": memory.get(way, memory[kind]) / 1e6,
                }
            )
    shape = f"{NUM_STEPS} × {SPEC.sequence_length} × {SPEC.width}"
    note = (
        f"Random features, {shape}, files in the page cache; medians of {ROUNDS} rounds in turns of {PAIRS} pairs, "
        f"once for each form of the reference: pair by pair from a buffer of {BUFFER}, read by a worker process as in "
        f"the release, or in the process itself. Ours is one thread, makes batches of {PAIRS}, checks every byte, and "
        "leaves decoding to the device; 2 threads read ahead, timed over an epoch. Memory is what a process of its own "
        "grew by."
    )
    return Table("Reading training pairs", rows, note)


def _write_set(folder: Path, encoding: str) -> float:
    """A set of one guidance branch, by the project's own writer; bytes a trajectory takes."""
    ends = TokenInterface(SPEC.num_tokens, *torch.zeros(2, SPEC.codebook_size, SPEC.width))
    card = Card(
        format_version=FORMAT_VERSION,
        base={"fingerprint": "random"},
        interface=interface_fingerprint(ends),
        spec=SPEC._asdict(),
        decoding={},
        branches=1,
        num_steps=NUM_STEPS,
        precision="32-true",
        encoding=encoding,
        text_rows=False,
        num_samples=NUM_SHARDS * ROWS,
        samples_per_shard=ROWS,
        seed=0,
        num_classes=SPEC.num_classes,
    )
    card.write(folder)
    save_interface(folder, ends)
    size = 0
    for index in range(NUM_SHARDS):
        ids = torch.tensor(card.ids(index))
        tokens = torch.randint(SPEC.codebook_size, (ROWS, SPEC.num_tokens))
        committed_at = torch.arange(SPEC.num_tokens).mul(NUM_STEPS).div(SPEC.num_tokens).long().expand(ROWS, -1)
        features = torch.stack([_features() for _ in range(ROWS)])[:, None]
        write_shard(folder, index, Trajectories(Conditions(ids, ids, ids), features, tokens, committed_at), card)
        size += sum(path.stat().st_size for path in folder.glob(f"shard-{index:06d}.*"))
    return size / card.num_samples


def _write_reference(path: Path) -> float:
    """A tar of pickled float32 tensors, one a trajectory; bytes a trajectory takes."""
    number = (NUM_SHARDS - 1) * ROWS
    with tarfile.open(path, "w") as tar:
        for index in range(number):
            content = io.BytesIO()
            torch.save(_features(), content)
            member = tarfile.TarInfo(f"{index:06d}.pth")
            member.size = content.tell()
            content.seek(0)
            tar.addfile(member, content)
    return path.stat().st_size / number


def _features() -> Tensor:
    return torch.randn(NUM_STEPS, SPEC.sequence_length, SPEC.width)


class _Pairs(IterableDataset[tuple[Tensor, Tensor]]):
    """Pairs out of the tar at ``path``, one trajectory after the other, endless."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        passes = (WebDataset(str(self.path), shardshuffle=False) for _ in count())
        return _pairs(chain.from_iterable(passes))


def _reference(path: Path, num_workers: int = 0) -> Iterator[Any]:
    """Pairs in batches of one."""
    pairs = DataLoader(_Pairs(path), batch_size=None, num_workers=num_workers)
    return iter(filters.shuffle(BUFFER, initial=BUFFER)(filters.batched(1)(pairs)))


def _pairs(samples: Iterable[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
    for sample in samples:
        features = torch.load(io.BytesIO(sample["pth"]), weights_only=True)
        yield from pairwise(features)


def _batches(folder: Path) -> Iterator[EncodedTransition]:
    """Batches of ours, epoch after epoch."""
    loader = _loader(folder, num_workers=0)
    return (batch for _ in count() for batch in loader)


def _ahead(folder: Path) -> EpochLoader[EncodedTransition]:
    """Batches of ours, read ahead by two threads; pairs of any two steps make an epoch long enough to time."""
    return _loader(folder, num_workers=2, max_gap=Card.read(str(folder)).num_steps - 1)


def _loader(folder: Path, num_workers: int, max_gap: int = 1) -> EpochLoader[EncodedTransition]:
    data = TrajectoryDataModule(str(folder), batch_size=PAIRS, num_workers=num_workers, max_gap=max_gap)
    data.setup("fit")
    return data.train_dataloader()


def _memory_apart(make: Callable[[Path], Iterable[object]], path: Path, number: int) -> int:
    """Bytes by which taking ``number`` items one after the other makes a new process grow at most."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_growth, make, path, number).result()


def _growth(make: Callable[[Path], Iterable[object]], path: Path, number: int) -> int:
    before = _peak()
    _take(make(path), number)
    return _peak() - before


def _peak() -> int:
    """Most bytes of memory that the process has had; ``getrusage`` would count those of the process it began as."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _take(items: Iterable[object], number: int) -> None:
    iterator = iter(items)
    for _ in range(number):
        next(iterator)
