"""The published systems with random weights, beside what the paper reports of them, and small ones to try the path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from benchmarks.decodings import decoding_of
from benchmarks.training import SIZES, Size
from lit_shortcut.bases.dimoo import published as dimoo
from lit_shortcut.bases.dimoo.toy import toy_dimoo
from lit_shortcut.bases.maskgit import imagenet
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.contracts import Conditions, MaskedImageModel
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.networks.shortcut import ShortcutNet, ShortcutNetwork
from lit_shortcut.sampling import Decoding

Scale = Literal["published", "tiny"]
_PROMPT = "A lighthouse on a cliff at dusk, a small boat below, oil on canvas"


@dataclass(frozen=True)
class System:
    """A base, its shortcut, and how both are run.

    Args:
        name: of the system.
        base: makes the base on a device.
        network: makes its shortcut.
        decoding: vanilla, which speed-ups refer to.
        paper: speed-ups that the paper (arXiv 2602.23996) reports, by (N, b); None where it has none.
        batch_size: images at once.
        rounds: timed runs of each row.
        prompt: for a base that takes prompts.
        num_recorded: images recorded; 0 leaves recording out.
        training: pairs to train on; None leaves training out.
    """

    name: str
    base: Callable[[torch.device], MaskedImageModel]
    network: Callable[[], ShortcutNetwork]
    decoding: Decoding
    paper: dict[tuple[int, int], float | None]
    batch_size: int
    rounds: int
    prompt: str = ""
    num_recorded: int = 0
    training: Size | None = None

    def conditions(self) -> Conditions:
        """Return what one batch is asked for."""
        ids = torch.arange(self.batch_size)
        return Conditions(ids, ids, ids % 10, (self.prompt,) * self.batch_size if self.prompt else ())


def systems(scale: Scale) -> list[System]:
    """Return the systems at ``scale``; the tiny ones have the paper's runs only in form."""
    if scale == "tiny":
        training = Size("tiny", {"width": 16, "num_heads": 2}, 16, 8, num_steps=4, kl_weight=0.0, batch_size=2)
        decoding, tiny_dimoo = Decoding(4), partial(LLaDAShortcutNet, 16, num_heads=2, mlp_width=32)
        return [
            System(
                "tiny MaskGIT",
                lambda device: ToyBase(),
                partial(ShortcutNet, 16, num_heads=2),
                decoding,
                {(4, 2): None},
                batch_size=2,
                rounds=1,
                num_recorded=4,
                training=training,
            ),
            System(
                "tiny Lumina-DiMOO", lambda device: toy_dimoo(), tiny_dimoo, decoding, {(4, 2): None}, 1, 1, "a cat"
            ),
        ]
    return [
        System(
            "MaskGIT 512×512",
            lambda device: imagenet.random_weights(),
            partial(ShortcutNet, 768),
            Decoding(),
            {(15, 7): 1.94, (15, 8): 1.74, (32, 8): 1.49, (32, 9): 1.36, (32, 12): 1.09},
            batch_size=128,
            rounds=3,
            num_recorded=256,
            training=SIZES[-1],
        ),
        # decoding only: at the paper's 23 s an image, recording 8 images in three ways takes as long as all else, and
        # 54 GB of disk; random pairs to train on have no prompts
        System(
            "Lumina-DiMOO 1024×1024",
            lambda device: dimoo.random_weights(device=str(device)),
            partial(LLaDAShortcutNet, 4096),
            decoding_of("dimoo"),
            {(64, 14): 4.0, (64, 11): 4.9, (64, 9): 5.8},
            batch_size=1,
            rounds=2,
            prompt=_PROMPT,
        ),
    ]
