"""The published systems with random weights, beside what the paper reports of them, and small ones to try the path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from benchmarks.decodings import decoding_of
from lit_shortcut.bases.dimoo import published as dimoo
from lit_shortcut.bases.dimoo.toy import toy_dimoo
from lit_shortcut.bases.maskgit import imagenet
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.contracts import Conditions, MaskedImageModel
from lit_shortcut.losses import LossRows
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
        num_recorded: images recorded.
        recorded_steps: steps in which they are.
        loss_rows: rows that the loss is a mean over.
    """

    name: str
    base: Callable[[torch.device], MaskedImageModel]
    network: Callable[[], ShortcutNetwork]
    decoding: Decoding
    paper: dict[tuple[int, int], float | None]
    batch_size: int
    rounds: int
    num_recorded: int
    recorded_steps: int
    loss_rows: LossRows = "masked"
    prompt: str = ""

    def conditions(self, count: int) -> Conditions:
        """Return what ``count`` images are asked for."""
        ids = torch.arange(count)
        return Conditions(ids, ids, ids % 10, (self.prompt,) * count if self.prompt else ())


def systems(scale: Scale) -> list[System]:
    """Return the systems at ``scale``; the tiny ones have the paper's runs only in form."""
    if scale == "tiny":
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
                recorded_steps=4,
            ),
            System(
                "tiny Lumina-DiMOO",
                lambda device: toy_dimoo(),
                tiny_dimoo,
                decoding,
                {(4, 2): None},
                batch_size=1,
                rounds=1,
                num_recorded=1,
                recorded_steps=3,
                loss_rows="all",
                prompt="a cat",
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
            recorded_steps=15,
        ),
        System(
            "Lumina-DiMOO 1024×1024",
            lambda device: dimoo.random_weights(device=str(device)),
            partial(LLaDAShortcutNet, 4096),
            decoding_of("dimoo"),
            {(64, 14): 4.0, (64, 11): 4.9, (64, 9): 5.8},
            batch_size=1,
            rounds=2,
            num_recorded=1,  # recording 64 steps would take minutes, at the paper's 23 s an image
            recorded_steps=16,
            loss_rows="all",
            prompt=_PROMPT,
        ),
    ]
