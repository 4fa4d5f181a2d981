"""Sets of recorded trajectories on disk: card, interface and shards, and the training windows inside them.

A set is a folder or a URL prefix: ``card.json``, ``interface.safetensors``, and shards ``shard-000000.tar`` … in
WebDataset's convention, uncompressed. A sample is ``00000000.safetensors`` (features, tokens, committed_at) and
``00000000.json`` (id, seed, label); nothing is pickled. Features are floating-point numbers, or 8-bit integers with a
tensor ``scales`` (:mod:`~lit_shortcut.trajectory.encoding`). Where a base takes prompts, the first also holds
``text_lengths`` and ``text_control``, the second ``prompt``, and S is that of the sample's own prompt.

Beside each shard lies ``shard-000000.json``: its size and sha256, checksums (xxh3_64) of all parts that are read alone,
each step's features among them, and the digest of the card. The card has its own digest and names the interface's
fingerprint. So any byte that reaches a training step was checked, and files of two sets do not mix.
"""

from lit_shortcut.trajectory.batches import OnCorrupt, WindowReader
from lit_shortcut.trajectory.card import FORMAT_VERSION, Card
from lit_shortcut.trajectory.encoding import DTYPES, Dtype, Encoded, encode
from lit_shortcut.trajectory.files import AccessError, TrajectoryError, is_remote, locate, shard_name
from lit_shortcut.trajectory.interface_file import interface_fingerprint, load_interface, save_interface
from lit_shortcut.trajectory.room import room_like
from lit_shortcut.trajectory.sample import Trajectory, stack
from lit_shortcut.trajectory.source import Source, read_shard
from lit_shortcut.trajectory.verification import problems
from lit_shortcut.trajectory.windows import EncodedTransition, Order, Window, course, select, transitions
from lit_shortcut.trajectory.writing import (
    check_shards,
    finished_shards,
    is_complete,
    recorded_bytes,
    remove_leftovers,
    remove_shards,
    write_shard,
)

__all__ = [
    "DTYPES",
    "FORMAT_VERSION",
    "AccessError",
    "Card",
    "Dtype",
    "Encoded",
    "EncodedTransition",
    "OnCorrupt",
    "Order",
    "Source",
    "Trajectory",
    "TrajectoryError",
    "Window",
    "WindowReader",
    "check_shards",
    "course",
    "encode",
    "finished_shards",
    "interface_fingerprint",
    "is_complete",
    "is_remote",
    "load_interface",
    "locate",
    "problems",
    "read_shard",
    "recorded_bytes",
    "remove_leftovers",
    "remove_shards",
    "room_like",
    "save_interface",
    "select",
    "shard_name",
    "stack",
    "transitions",
    "write_shard",
]
