"""Errors of several predictions in a row, along recorded trajectories."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_shortcut.acceleration.accelerated import Accelerated, Predictor
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.acceleration.replay import Replay
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.contracts import FeatureFn, State
from lit_shortcut.guidance import guide_rows
from lit_shortcut.metrics.functional import gain_over_hold
from lit_shortcut.metrics.places import Masked, Seen, place_means
from lit_shortcut.networks.shortcut import ShortcutNetwork
from lit_shortcut.precision import KeptDtype

_SUFFIXES = {"shortcut": "", "hold": "_hold"}


class Rollouts(KeptDtype):
    """Measures of 1 … ``depth`` predictions in a row by the shortcut, and by hold.

    Args:
        depth: K, most predictions in a row.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.measures: Any = nn.ModuleDict(
            {
                name: nn.ModuleList(place_means(k, suffix) for k in range(1, 1 + depth))
                for name, suffix in _SUFFIXES.items()
            }
        )

    def update(self, replay: Replay, network: ShortcutNetwork) -> None:
        """Add a recorded batch, rolled by ``network`` from each of its steps; one step at a time is on the device."""
        predictors: dict[str, Predictor] = {"shortcut": Shortcut(network), "hold": Hold()}
        methods = {name: Accelerated(Even(1), predictor) for name, predictor in predictors.items()}
        interface, mask_id = replay.interface, replay.spec.mask_id
        is_guided = network.options.guided

        def seen(features: Tensor, state: State) -> Tensor:
            return guide_rows(features, state.guidance, interface.num_rows)[None] if is_guided else features

        # of a trajectory's own rows, whatever the batch
        means = [seen(features, state)[:, :, : interface.num_rows].mean(2) for state, features in replay.steps()]
        centre = torch.stack(means).mean(0)[:, :, None]
        rolled: list[dict[str, FeatureFn]] = []  # rolled[k]: runs whose last base features are k + 1 steps old
        for state, recorded in replay.steps():
            features = seen(recorded, state)
            truth = Seen(features, interface.logits(features), centre)
            tokens = (state.tokens == mask_id).expand(len(features), -1, -1)
            masked = Masked(interface.masked_rows(tokens), tokens)
            for age, runs in enumerate(rolled):
                for name, run in runs.items():
                    guess = seen(run(state)[0], state)
                    logits = interface.logits(guess) if age == 0 else truth.logits  # of more steps, only errors count
                    self.measures[name][age].update(Seen(guess, logits, centre), truth, masked)
            begun = {name: method.start(replay, replay.recorded, replay.counts) for name, method in methods.items()}
            for run in begun.values():
                run(state)
            rolled = [begun, *rolled][: self.depth]

    def compute(self) -> dict[str, Tensor]:
        """Return means over all batches and ranks and each as gain over hold, and begin again."""
        mean: dict[str, Tensor] = {}
        for by_depth in self.measures.values():
            for measured in by_depth:
                mean |= measured.compute()
                measured.reset()
        found = {name: value for name, value in mean.items() if not name.startswith("rollout")}
        for k in range(2, 1 + self.depth):
            found[f"rollout_mse_{k}"] = mean[f"rollout_mse_{k}"]
            found[f"rollout_gain_{k}"] = gain_over_hold(mean[f"rollout_mse_{k}"], mean[f"rollout_mse_{k}_hold"])
        found["gain"] = gain_over_hold(mean["mse"], mean["mse_hold"])
        for cosine in ("cosine", "cosine_centred"):
            found[f"{cosine}_gain"] = gain_over_hold(1 - mean[cosine], 1 - mean[f"{cosine}_hold"])
        found["head_kl_gain"] = gain_over_hold(mean["head_kl"], mean["head_kl_hold"])
        return found
