"""Sets of recorded trajectories on disk: card, interface and shards, and the training windows inside them.

A set is a folder or a URL prefix: ``card.json``, ``interface.safetensors``, and shards ``shard-000000.tar`` … in
WebDataset's convention, uncompressed, with an index ``shard-000000.json`` beside each. Plain WebDataset reads a set::

    for sample in wds.WebDataset(urls, shardshuffle=False).decode():
        sample["json"]                                              # id, seed, label; prompt where there is one
        features = torch.from_numpy(sample["c03.npy"])              # conditional branch, step 3: (S, C)
        features = features.view(torch.bfloat16)                    # numpy has none, they are stored as uint16
        features = sample["c03.npy"] * sample["c03.scales.npy"][:, None]      # or, of int8
        sample["tokens.npy"], sample["committed_at.npy"]            # (L,) final codes; the step that committed each

``u03.npy`` is the unconditional branch. If the features include rows of a text (``text_rows``), ``prefix.lengths.npy``
(G,) counts them, ``prefix.control.npy`` (P, C) holds the embeddings that are control, and S differs between branches.

The index holds the offset and checksum (xxh3_64) of every member's array, and the digest of the card; the card has its
own digest and the interface's fingerprint. So every byte that reaches a training step was checked, and files of two
sets cannot be mixed. Nothing is pickled.
"""

from lit_shortcut.trajectory.card import FORMAT_VERSION, Card, TrajectoryError
from lit_shortcut.trajectory.encoding import ENCODINGS, Encoding, register
from lit_shortcut.trajectory.source import Source, read_shard
from lit_shortcut.trajectory.verification import problems
from lit_shortcut.trajectory.writing import write_shard

__all__ = [
    "ENCODINGS",
    "FORMAT_VERSION",
    "Card",
    "Encoding",
    "Source",
    "TrajectoryError",
    "problems",
    "read_shard",
    "register",
    "write_shard",
]
