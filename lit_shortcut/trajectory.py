"""A set of recorded trajectories on disk: card, interface and shards, and the training windows inside them.

A set is a folder or a URL prefix: ``card.json``, ``interface.safetensors``, and shards ``shard-000000.tar`` … in
WebDataset's convention, each with its size and sha256 in ``shard-000000.json`` beside it. A sample is
``00000000.safetensors`` (features, tokens, committed_at) and ``00000000.json`` (id, seed, label); nothing is pickled.
Where a base takes prompts, the first also holds ``text_lengths`` and ``text_control``, the second ``prompt``, and S is
that of the sample's own prompt.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, NamedTuple, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from lit_shortcut.contracts import Conditions, Control, Text, TokenSpec, Trajectories, Transition
from lit_shortcut.interface import TokenInterface
from lit_shortcut.weights import load_tensors, save_tensors

FORMAT_VERSION = 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_CARD = "card.json"
_INTERFACE = "interface.safetensors"
_HEADERS = 4096  # bytes a sample takes beside its tensors: two tar headers, a JSON file, padding


class TrajectoryError(ValueError):
    """A set of trajectories is missing, damaged, not writable, or not the one asked for."""


@dataclass(frozen=True)
class Card:
    """What a set holds and how it was made; equal cards, equal sets.

    Args:
        format_version: of this schema.
        base_fingerprint: of the base that computed the features.
        spec: fields of the base's :class:`TokenSpec`.
        decoding: how tokens were drawn.
        branches: G.
        num_steps: N.
        dtype: of the features, a key of ``DTYPES``.
        num_samples: trajectories in the set.
        samples_per_shard: in every shard but the last, which holds what is left.
        seed: of the run; each sample's own comes from it.
        num_classes: labels went round so many classes, or prompts.
        prompts: sha256 of the list of prompts; empty where classes were asked for.
    """

    format_version: int
    base_fingerprint: str
    spec: dict[str, Any]
    decoding: dict[str, Any]
    branches: int
    num_steps: int
    dtype: str
    num_samples: int
    samples_per_shard: int
    seed: int
    num_classes: int
    prompts: str = ""

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise TrajectoryError(f"format_version: expected {FORMAT_VERSION}, found {self.format_version}")
        if self.dtype not in DTYPES:
            raise TrajectoryError(f"dtype: expected one of {', '.join(DTYPES)}, found {self.dtype!r}")
        if set(self.spec) != set(TokenSpec._fields) or not all(type(size) is int for size in self.spec.values()):
            raise TrajectoryError(f"spec: expected integers {', '.join(TokenSpec._fields)}, found {self.spec}")
        for name in ("branches", "num_steps", "num_samples", "samples_per_shard"):
            if getattr(self, name) < 1:
                raise TrajectoryError(f"{name}: expected at least 1, found {getattr(self, name)}")

    @property
    def num_shards(self) -> int:
        """Shards of the complete set."""
        return -(-self.num_samples // self.samples_per_shard)

    @property
    def features_shape(self) -> tuple[int, int, int, int]:
        """(G, N, S, C) of one trajectory; S at most so long where prompts differ."""
        return self.branches, self.num_steps, self.spec["sequence_length"], self.spec["width"]

    @property
    def sample_bytes(self) -> int:
        """Size of one trajectory on disk, rounded up by a few kB."""
        grid = self.spec["num_tokens"] * (torch.int32.itemsize + torch.int16.itemsize)
        return int(prod(self.features_shape) * DTYPES[self.dtype].itemsize + grid + _HEADERS)

    def ids(self, index: int) -> range:
        """Ids of the samples in shard ``index``."""
        start = index * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, self.num_samples))

    def write(self, folder: Path) -> None:
        """Write ``card.json`` into ``folder``, whole or not at all."""
        with _whole(folder / _CARD) as file:
            file.write((json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def read(cls, source: str | Path) -> Card:
        """The card of the set at ``source``.

        Raises:
            TrajectoryError: if it is missing, no JSON, of another version, or a key is missing or of a wrong type.
        """
        where = locate(source, _CARD)
        try:
            with _opened(where) as file:
                values = json.loads(file.read())
        except OSError as error:
            raise TrajectoryError(f"{where}: expected the card of a set of trajectories ({error})") from error
        except ValueError as error:
            raise TrajectoryError(f"{where}: expected JSON ({error})") from error
        if not isinstance(values, dict):
            raise TrajectoryError(f"{where}: expected a JSON object, found {type(values).__name__}")
        if values.get("format_version") != FORMAT_VERSION:
            found = values.get("format_version")
            raise TrajectoryError(f"{where}: format_version: expected {FORMAT_VERSION}, found {found!r}")
        kinds = {name: get_origin(hint) or hint for name, hint in get_type_hints(cls).items()}
        optional = {field.name for field in fields(cls) if field.default is not MISSING}  # newer than some sets
        for name in sorted((kinds.keys() ^ values.keys()) - optional):
            raise TrajectoryError(f"{where}: {name}: " + ("missing" if name in kinds else "no key of a card"))
        for name, kind in kinds.items():
            if name in values and type(values[name]) is not kind:
                raise TrajectoryError(f"{where}: {name}: expected {kind.__name__}, found {values[name]!r}")
        try:
            return cls(**values)
        except TrajectoryError as error:
            raise TrajectoryError(f"{where}: {error}") from error


class Trajectory(NamedTuple):
    """One recorded sample: ``features`` (G, N, S, C), ``tokens`` (L,) int32, ``committed_at`` (L,) int16.

    Where it was drawn for a ``prompt``, ``text_lengths`` (G,) int32 and ``text_control`` (P, C) tell what
    :class:`~lit_shortcut.contracts.Text` does.
    """

    id: int
    seed: int
    label: int
    features: Tensor
    tokens: Tensor
    committed_at: Tensor
    prompt: str = ""
    text_lengths: Tensor | None = None
    text_control: Tensor | None = None

    def text(self) -> Text | None:
        """Of all branches, (G, …): control in the first alone."""
        if self.text_lengths is None or self.text_control is None:
            return None
        lengths = self.text_lengths.long()
        control = self.text_control.new_zeros(len(lengths), int(lengths.max()), self.text_control.shape[1])
        control[0, : len(self.text_control)] = self.text_control
        num_control = torch.zeros_like(lengths)
        num_control[0] = len(self.text_control)
        return Text(lengths, control, num_control)


def shard_name(index: int) -> str:
    """File name of shard ``index``."""
    return f"shard-{index:06d}.tar"


def locate(source: str | Path, name: str) -> str:
    """Path or URL of file ``name`` of the set at ``source``.

    Raises:
        TrajectoryError: if ``source`` would have WebDataset run a command.
    """
    source = str(source)
    if source.startswith("pipe:") or "::" in source:
        raise TrajectoryError(f"{source}: expected a folder or a URL prefix; 'pipe:' and '::' are refused")
    return f"{source.rstrip('/')}/{name}"


def is_remote(source: str | Path) -> bool:
    """Whether ``source`` is a URL prefix and no folder."""
    return "://" in str(source)


def save_interface(folder: Path, interface: TokenInterface) -> None:
    """Write ``interface`` beside the shards in ``folder``."""
    tensors = {  # cloned, because a base may tie embedding and head, and safetensors refuses shared memory
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in interface.state_dict().items()
    }
    save_tensors(folder / _INTERFACE, tensors, {"num_tokens": interface.num_tokens})


def load_interface(source: str | Path) -> TokenInterface:
    """The interface of the set at ``source``.

    Raises:
        WeightsError: if the file is missing or damaged.
        TrajectoryError: if it does not hold an interface.
    """
    where = locate(source, _INTERFACE)
    with TemporaryDirectory() as scratch:
        path = Path(where)
        if is_remote(source):
            path = Path(scratch) / _INTERFACE
            with _opened(where) as file:
                path.write_bytes(file.read())
        tensors, metadata = load_tensors(path)
    try:
        return TokenInterface(metadata["num_tokens"], **tensors)
    except (KeyError, TypeError) as error:
        raise TrajectoryError(f"{where}: expected a token interface ({error})") from error


def write_shard(folder: Path, index: int, trajectories: Trajectories, card: Card) -> None:
    """Write ``trajectories``, all samples of shard ``index``, to ``folder``: whole or not at all.

    Equal trajectories give equal bytes.

    Raises:
        TrajectoryError: if they are not the shard's samples, do not fit ``card``, are not finite, or if the file cannot
            be written.
    """
    path = folder / shard_name(index)
    conditions = trajectories.conditions
    ids, seeds, labels = (column.tolist() for column in conditions[:3])
    if ids != list(card.ids(index)):
        raise TrajectoryError(f"{path}: expected samples {card.ids(index)}, got {ids}")
    with _whole(path) as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for row, facts in enumerate(zip(ids, seeds, labels, strict=True)):
                one = Trajectory(
                    *facts,
                    trajectories.features[row].to("cpu", DTYPES[card.dtype]),
                    trajectories.tokens[row].to("cpu", torch.int32),
                    trajectories.committed_at[row].to("cpu", torch.int16),
                )
                if trajectories.text is not None:
                    one = _with_text(one, trajectories.text, row, conditions.prompts[row])
                _check(one, card, f"{path}: sample {one.id}")
                values = one._asdict()
                tensors = {name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}
                told = {name: values[name] for name in ("id", "seed", "label", "prompt") if values[name] != ""}
                _add(tar, f"{one.id:08d}.safetensors", save(tensors))
                _add(tar, f"{one.id:08d}.json", json.dumps(told).encode())
        size = file.tell()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        with _whole(path.with_suffix(".json")) as sidecar:  # before the shard, whose presence says that both are there
            sidecar.write(json.dumps({"samples": len(ids), "bytes": size, "sha256": digest}).encode())


def finished_shards(folder: Path, card: Card) -> set[int]:
    """Shards of ``card`` that lie in ``folder`` with the size they were written with."""
    return {index for index in range(card.num_shards) if _size(folder, index) is not None}


def is_complete(folder: Path, card: Card) -> bool:
    """Whether all shards of ``card`` lie in ``folder``."""
    return len(finished_shards(folder, card)) == card.num_shards


def recorded_bytes(folder: Path, card: Card) -> int:
    """Size of the finished shards in ``folder``."""
    return sum(_size(folder, index) or 0 for index in range(card.num_shards))


def check_shards(folder: Path, card: Card) -> None:
    """Raise a :class:`TrajectoryError` that names the first shard missing or cut short in ``folder``."""
    missing = sorted(set(range(card.num_shards)) - finished_shards(folder, card))
    if missing:
        path = folder / shard_name(missing[0])
        problem = f"its size differs from {path.with_suffix('.json').name}" if path.exists() else "no such shard"
        raise TrajectoryError(
            f"{path}: {problem}; {len(missing)} of {card.num_shards} shards are not whole: record the set to its end"
        )


def remove_shards(folder: Path) -> None:
    """Delete all shards in ``folder``, and what an interrupted run left aside."""
    for path in sorted(folder.glob("shard-*")) + sorted(folder.glob(".shard-*.tmp*")):
        path.unlink()


def read_shard(source: str | Path, index: int, card: Card) -> Iterator[dict[str, Any]]:
    """The raw samples of shard ``index``: bytes by file ending, ``__key__`` and ``__url__``.

    Raises:
        TrajectoryError: if the shard is missing, damaged, or holds more or fewer samples than ``card`` says.
    """
    url, found = locate(source, shard_name(index)), 0
    try:
        with _opened(url) as stream:
            for sample in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
                found += 1
                yield sample
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        reason = next((part for part in error.args if isinstance(part, str)), error)  # WebDataset adds streams
        raise TrajectoryError(f"{url}: not a readable shard ({reason})") from error
    if found != len(card.ids(index)):  # tar readers take a file cut between two members for a whole one
        raise TrajectoryError(f"{url}: expected {len(card.ids(index))} samples, found {found}; the shard is cut short")


def read_trajectory(sample: dict[str, Any], card: Card) -> Trajectory:
    """The trajectory in a raw ``sample`` of :func:`read_shard`.

    Raises:
        TrajectoryError: naming shard and sample, if a member is missing or unreadable, or does not fit ``card``.
    """
    where = f"{sample.get('__url__')}: sample {sample.get('__key__')}"
    try:
        facts, tensors = json.loads(sample["json"]), load(sample["safetensors"])
        numbers = (int(facts["id"]), int(facts["seed"]), int(facts["label"]))
        grid = (tensors["features"], tensors["tokens"], tensors["committed_at"])
        text = (str(facts["prompt"]), tensors["text_lengths"], tensors["text_control"]) if card.prompts else ()
        one = Trajectory(*numbers, *grid, *text)
    except KeyError as error:
        raise TrajectoryError(f"{where}: {error} is missing") from error
    except (ValueError, TypeError, SafetensorError) as error:
        raise TrajectoryError(f"{where}: not readable ({error})") from error
    _check(one, card, where)
    return one


def stack(trajectories: Sequence[Trajectory]) -> Trajectories:
    """A batch of whole ``trajectories``, rows padded to the longest; features keep their dtype, all else is int64."""
    columns = list(zip(*trajectories, strict=True))
    texts = [text for text in (one.text() for one in trajectories) if text is not None]
    prompts = tuple(one.prompt for one in trajectories) if texts else ()
    ids, seeds, labels = (torch.tensor(column) for column in columns[:3])
    tokens, committed_at = (torch.stack(column) for column in columns[4:6])
    features = torch.stack(_padded(columns[3]))
    conditions = Conditions(ids, seeds, labels, prompts)
    return Trajectories(conditions, features, tokens.long(), committed_at.long(), _joined(texts, torch.stack))


def transitions(one: Trajectory, window: int = 1) -> Iterator[Transition]:
    """The windows of ``window`` (R) steps in ``one``, each a batch of one: G · (N − R) of them, branch by branch.

    Features are copied, so that a window kept in a buffer does not keep its trajectory alive.
    """
    num_steps = one.features.shape[1]
    tokens, steps = one.tokens.long(), torch.arange(num_steps)[:, None]
    is_masked = one.committed_at > steps  # (N, L), after each step
    share = is_masked.float().mean(1)
    places = [row.nonzero()[:, 0] for row in one.committed_at == steps]
    text = one.text()
    for index, features in enumerate(one.features):
        own, branch = None, features
        if text is not None:
            own = Text(*(part[index : index + 1] for part in text))
            branch = features[:, : features.shape[1] - int(text.lengths.max() - own.lengths)]  # without padding
            own = own._replace(control=own.control[:, : int(own.lengths)])
        for start in range(num_steps - window):
            inside = slice(start, start + window)
            positions = pad_sequence(places[inside], batch_first=True)
            is_real = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in places[inside]], batch_first=True)
            yield Transition(
                features=branch[start].clone()[None],
                control=Control(tokens[positions][None], positions[None], is_real[None]),
                masked_share=share[inside][None],
                targets=branch[start + 1 : start + window + 1].clone()[None],
                is_masked=is_masked[inside][None],
                step=torch.tensor([start]),
                text=own,
            )


def collate(items: Sequence[Transition]) -> Transition:
    """One batch of ``items``, control and rows padded to the longest among them."""
    longest = max(item.control.tokens.shape[2] for item in items)

    def joined(name: str) -> Tensor:
        tensors: list[Tensor] = [getattr(item.control, name) for item in items]
        return torch.cat([pad(tensor, (0, longest - tensor.shape[2])) for tensor in tensors])

    return Transition(
        features=torch.cat(_padded([item.features for item in items])),
        control=Control(joined("tokens"), joined("positions"), joined("is_real")),
        masked_share=torch.cat([item.masked_share for item in items]),
        targets=torch.cat(_padded([item.targets for item in items])),
        is_masked=torch.cat([item.is_masked for item in items]),
        step=torch.cat([item.step for item in items]),
        text=_joined([item.text for item in items if item.text is not None], torch.cat),
    )


def _padded(rows: Sequence[Tensor]) -> list[Tensor]:
    """Each of ``rows`` (…, S, C) padded to the longest S."""
    longest = max(part.shape[-2] for part in rows)
    return [pad(part, (0, 0, 0, longest - part.shape[-2])) for part in rows]


def _joined(texts: Sequence[Text], join: Callable[[list[Tensor]], Tensor]) -> Text | None:
    """``texts`` joined by ``join``, control padded to the longest; None of none."""
    if not texts:
        return None
    return Text(
        lengths=join([text.lengths for text in texts]),
        control=join(_padded([text.control for text in texts])),
        num_control=join([text.num_control for text in texts]),
    )


def _with_text(one: Trajectory, text: Text, row: int, prompt: str) -> Trajectory:
    """``one`` with its row of ``text`` (B, G, …), without the rows that pad the features to those of the batch."""
    lengths = text.lengths[row].to("cpu", torch.int32)
    padding = text.control.shape[-2] - int(lengths.max())
    return one._replace(
        features=one.features[:, :, : one.features.shape[2] - padding],
        prompt=prompt,
        text_lengths=lengths,
        text_control=text.control[row, 0, : int(text.num_control[row, 0])].cpu(),
    )


def _check(one: Trajectory, card: Card, where: str) -> None:
    grid = (card.spec["num_tokens"],)
    branches, num_steps, num_rows, width = card.features_shape
    expected: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
        ("tokens", torch.int32, grid),
        ("committed_at", torch.int16, grid),
    ]
    if one.text_lengths is not None and one.text_control is not None:
        num_rows = min([num_rows, *one.features.shape[-2:-1]])  # those of its own prompt
        expected.append(("text_lengths", torch.int32, (branches,)))
        expected.append(("text_control", one.text_control.dtype, (int(one.text_lengths[:1]), width)))
    expected.append(("features", DTYPES[card.dtype], (branches, num_steps, num_rows, width)))
    for name, dtype, shape in expected:
        found: Tensor = getattr(one, name)
        if found.dtype != dtype or found.shape != shape:
            raise TrajectoryError(
                f"{where}: {name}: expected {dtype} {shape}, found {found.dtype} {tuple(found.shape)}"
            )
    for name in ("features", "text_control"):
        values = getattr(one, name)
        if values is not None and not values.isfinite().all():
            kind = str(values.dtype).removeprefix("torch.")
            raise TrajectoryError(f"{where}: {name}: expected finite {kind}, found NaN or infinity")
    for name, end in (("tokens", card.spec["codebook_size"]), ("committed_at", card.num_steps)):
        low, high = (int(bound) for bound in torch.aminmax(getattr(one, name)))
        if low < 0 or high >= end:
            raise TrajectoryError(f"{where}: {name}: expected values in 0..{end - 1}, found {low}..{high}")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # time and owner 0, mode 0644, whoever writes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _size(folder: Path, index: int) -> int | None:
    """Bytes of shard ``index``, None where it is missing or its sidecar says otherwise."""
    path = folder / shard_name(index)
    try:
        size = path.stat().st_size
        return size if json.loads(path.with_suffix(".json").read_bytes())["bytes"] == size else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _opened(where: str) -> AbstractContextManager[IO[bytes]]:
    if is_remote(where):
        remote: AbstractContextManager[IO[bytes]] = gopen(where)
        return remote
    return Path(where).open("rb")


@contextmanager
def _whole(path: Path) -> Iterator[io.BufferedRandom]:
    """A file that is at ``path`` once the block has ended well, and leaves nothing otherwise."""
    aside = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise TrajectoryError(
            f"{path}: cannot be written ({error.strerror or error}). Finished shards remain valid; "
            "running the same command again goes on with the missing ones"
        ) from error
    finally:
        with suppress(OSError):
            aside.unlink()
