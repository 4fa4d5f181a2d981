"""One recorded sample: its tensors, what a card demands of them, and where they lie in a safetensors member."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import isfinite, prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_shortcut.contracts import Conditions, Prefix, Trajectories
from lit_shortcut.trajectory.card import Card
from lit_shortcut.trajectory.encoding import DTYPES, SCALES, Encoded
from lit_shortcut.trajectory.files import TrajectoryError

_KINDS = {
    "I8": torch.int8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I16": torch.int16,
    "I32": torch.int32,
}
_NAMES = {dtype: name for name, dtype in _KINDS.items()}
_HEADER = 2**16  # bytes of a safetensors header; real ones have 600
_ALIGNED = 8  # a header is a multiple of so many bytes long


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

    def text(self) -> Prefix | None:
        """Of all branches, (G, …): control in the first alone."""
        if self.text_lengths is None or self.text_control is None:
            return None
        return branch_texts(self.text_lengths, self.text_control)


class Member(NamedTuple):
    """A tensor inside a safetensors member: ``dtype``, ``shape``, and its first byte and the one behind its last."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def branch_texts(lengths: Tensor, control: Tensor) -> Prefix:
    """Texts (G, …) of all branches from their ``lengths`` (G,) and the ``control`` (P, C) of the first."""
    lengths = lengths.long()
    of_all = control.new_zeros(len(lengths), int(lengths.max()), control.shape[1])
    of_all[0, : len(control)] = control
    num_control = torch.zeros_like(lengths)
    num_control[0] = len(control)
    return Prefix(lengths, of_all, num_control)


def parse_header(content: bytes, size: int, where: str) -> dict[str, Member]:
    """Where the tensors of a safetensors member of ``size`` bytes lie; ``content`` are its first, at most ``_HEADER``.

    Offsets count from the member's first byte. The tensors fill the member.

    Raises:
        TrajectoryError: if it is no safetensors header.
    """
    length = 8 + int.from_bytes(content[:8], "little")
    try:
        if not 8 < length <= min(len(content), size):
            raise ValueError(f"a header of {length - 8} bytes in a member of {size}")
        entries = json.loads(content[8:length])
        entries.pop("__metadata__", None)
        members = {
            name: Member(_KINDS[entry["dtype"]], tuple(entry["shape"]), *(length + at for at in entry["data_offsets"]))
            for name, entry in entries.items()
        }
        end = length
        numbers = [number for member in members.values() for number in (*member.shape, member.start, member.stop)]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("sizes that are no whole numbers")
        for member in sorted(members.values(), key=lambda member: member.start):
            if member.start != end or member.stop - end != prod(member.shape) * member.dtype.itemsize:
                raise ValueError("offsets that do not follow from the shapes")
            end = member.stop
        if end != size:
            raise ValueError(f"tensors that end at byte {end} of {size}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TrajectoryError(f"{where}: not readable (no safetensors header: {error})") from error
    return members


def lay_out(kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Member]:
    """Where tensors of so many dtypes and shapes lie in a member, in the order they lie: wide dtypes first.

    Scales come last, as they are known when the features are written.
    """
    order = sorted(kinds, key=lambda name: (name == "scales", -kinds[name][0].itemsize, name))
    members, end = {}, 0
    for name in order:
        dtype, shape = kinds[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        members[name] = Member(dtype, shape, start, end)
    length = len(header_of(members))  # offsets in the header count from its end
    return {name: one._replace(start=one.start + length, stop=one.stop + length) for name, one in members.items()}


def header_of(members: dict[str, Member]) -> bytes:
    """The safetensors header of ``members``, which :func:`parse_header` reads."""
    first = min(member.start for member in members.values())
    entries = {
        name: {
            "dtype": _NAMES[member.dtype],
            "shape": member.shape,
            "data_offsets": (member.start - first, member.stop - first),
        }
        for name, member in members.items()
    }
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNED)
    return len(content).to_bytes(8, "little") + content


Range = tuple[int, int]
"""The first byte and the one behind the last."""


def step_blocks(members: dict[str, Member]) -> list[list[Range]]:
    """Bytes of the features at each step, branch by branch, and of their scales."""
    stored = [members[name] for name in ("features", "scales") if name in members]
    steps = prod(members["features"].shape[:2])
    sizes = [(member.stop - member.start) // steps for member in stored]
    return [
        [(one.start + step * size, one.start + (step + 1) * size) for one, size in zip(stored, sizes, strict=True)]
        for step in range(steps)
    ]


def rest_of(members: dict[str, Member]) -> list[Range]:
    """Bytes of a member that belong to no step: its header and the tensors beside the features."""
    stored = sorted((members[name].start, members[name].stop) for name in ("features", "scales") if name in members)
    end = max(member.stop for member in members.values())
    edges = [0, *(edge for both in stored for edge in both), end]
    return [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]


def header_limit(size: int) -> int:
    """Bytes at the beginning of a member of ``size`` bytes that :func:`parse_header` may need."""
    return min(size, _HEADER)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of ``tensor``, which is contiguous and on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def require_members(members: dict[str, Member], card: Card, where: str) -> None:
    """Raise a :class:`TrajectoryError` unless ``members`` have the names, types and shapes that ``card`` tells.

    Where prompts differ, the number of rows is the sample's own.
    """
    branches, num_steps, num_rows, width = card.features_shape
    grid = (card.spec["num_tokens"],)
    names = {"features", "tokens", "committed_at"}
    names |= {"scales"} if card.dtype == "int8" else set()
    names |= {"text_lengths", "text_control"} if card.prompts else set()
    for name in sorted(names ^ members.keys()):
        problem = f"'{name}' is missing" if name in names else f"'{name}' is no tensor of a sample"
        raise TrajectoryError(f"{where}: {problem}")
    if card.prompts:
        found = members["features"].shape
        num_rows = min([num_rows, *found[-2:-1]])
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "features": (DTYPES[card.dtype], (branches, num_steps, num_rows, width)),
        "scales": (SCALES, (branches, num_steps, num_rows)),
        "tokens": (torch.int32, grid),
        "committed_at": (torch.int16, grid),
        "text_lengths": (torch.int32, (branches,)),
    }
    if card.prompts:
        text = members["text_control"]
        floating = text.dtype if text.dtype.is_floating_point else torch.float32
        expected["text_control"] = (floating, (min([num_rows, *text.shape[:1]]), width))
    for name in sorted(names):
        member = members[name]
        if (member.dtype, member.shape) != expected[name]:
            dtype, shape = expected[name]
            raise TrajectoryError(f"{where}: {name}: expected {dtype} {shape}, found {member.dtype} {member.shape}")


def require_values(tensors: dict[str, Tensor], num_rows: int, card: Card, where: str) -> None:
    """Raise a :class:`TrajectoryError` unless ``tensors`` beside features of so many rows hold what ``card`` allows."""
    for name, end in (("tokens", card.spec["codebook_size"]), ("committed_at", card.num_steps)):
        low, high = (int(bound) for bound in torch.aminmax(tensors[name]))
        if low < 0 or high >= end:
            raise TrajectoryError(f"{where}: {name}: expected values in 0..{end - 1}, found {low}..{high}")
    if not card.prompts:
        return
    lengths, control = tensors["text_lengths"], tensors["text_control"]
    longest = num_rows - card.spec["num_tokens"]
    if int(lengths.max()) > longest:
        raise TrajectoryError(
            f"{where}: text_lengths: expected at most {longest} beside features of {num_rows} rows, "
            f"found {int(lengths.max())}"
        )
    if len(control) != int(lengths[0]) or int(lengths.min()) < 0:
        raise TrajectoryError(
            f"{where}: text_control: expected {control.dtype} {(int(lengths[0]), control.shape[1])}, "
            f"found {control.dtype} {tuple(control.shape)}"
        )
    require_finite("text_control", control, where)


def require_finite(name: str, values: Tensor, where: str) -> None:
    """Raise a :class:`TrajectoryError` if ``values`` hold NaN or infinity."""
    if values.numel() and not all(isfinite(bound.item()) for bound in torch.aminmax(values)):  # quicker than of all
        kind = str(values.dtype).removeprefix("torch.")
        raise TrajectoryError(f"{where}: {name}: expected finite {kind}, found NaN or infinity")


def require_finite_features(features: Encoded, where: str) -> None:
    """Raise a :class:`TrajectoryError` if ``features`` decode to NaN or infinity."""
    if features.scales is not None:
        require_finite("scales", features.scales, where)
    else:
        require_finite("features", features.values, where)


def stack(trajectories: Sequence[Trajectory]) -> Trajectories:
    """A batch of whole ``trajectories``, rows padded to the longest; features keep their dtype, all else is int64."""
    columns = list(zip(*trajectories, strict=True))
    texts = [text for text in (one.text() for one in trajectories) if text is not None]
    prompts = tuple(one.prompt for one in trajectories) if texts else ()
    ids, seeds, labels = (torch.tensor(column) for column in columns[:3])
    tokens, committed_at = (torch.stack(column) for column in columns[4:6])
    features = columns[3][0][None] if len(trajectories) == 1 else torch.stack(padded(columns[3]))
    conditions = Conditions(ids, seeds, labels, prompts)
    return Trajectories(conditions, features, tokens.long(), committed_at.long(), joined(texts, torch.stack))


def padded(rows: Sequence[Tensor]) -> list[Tensor]:
    """Each of ``rows`` (…, S, C) padded to the longest S; what is as long is not copied."""
    longest = max(part.shape[-2] for part in rows)
    return [part if part.shape[-2] == longest else pad(part, (0, 0, 0, longest - part.shape[-2])) for part in rows]


def joined(texts: Sequence[Prefix], join: Callable[[list[Tensor]], Tensor]) -> Prefix | None:
    """``texts`` joined by ``join``, control padded to the longest; None of none."""
    if not texts:
        return None
    return Prefix(
        lengths=join([text.lengths for text in texts]),
        control=join(padded([text.control for text in texts])),
        num_control=join([text.num_control for text in texts]),
    )
