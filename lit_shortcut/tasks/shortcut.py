"""Train a shortcut network on recorded trajectories (arXiv 2602.23996, section 3; method of the published weights)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from lit_shortcut.acceleration.compilation import require_compiler
from lit_shortcut.acceleration.replay import RecordedEnds, Replay
from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import Control, TokenSpec, Trajectories, Transition
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.losses import Loss, MaskedMSE, Places, masked_tokens, weighted_sum
from lit_shortcut.metrics.functional import gain_over_hold
from lit_shortcut.metrics.places import diagnostics
from lit_shortcut.networks.control import Layout, advance, lay_out_transition, require_kind
from lit_shortcut.networks.shortcut import ShortcutNetwork
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.optimized import OptimizedTask
from lit_shortcut.tasks.ranks import sum_over_ranks
from lit_shortcut.tasks.rollouts import Rollouts
from lit_shortcut.trajectory import Card
from lit_shortcut.weights import WeightsError

_OWN_NAMES = ("loss", "gain", "cosine", "cosine_gain")


class ShortcutTask(OptimizedTask):
    """Train a network for the change of the features, by default as published: squared error at places still masked.

    Validation repeats the prediction 1 … ``rollout_depth`` steps in a row along each recorded trajectory and compares
    with "hold" (the last base features again): ``val/gain`` is 1 − MSE / MSE of hold, after one step, and
    ``val/rollout_gain_k`` after k.

    Args:
        network: the shortcut to train, new or loaded.
        losses: by name, each with its weight; squared error at masked places by default.
        rollout_depth: K, consecutive shortcut steps in validation. In training the depth is drawn from 1 to the
            datamodule's window, and the gradient runs through the last step only; an anchored network is trained on
            gaps instead, up to the datamodule's max_gap.
        compiled: run the network through ``torch.compile``.
        optimizer: makes the optimiser from parameters.
        scheduler: makes the learning-rate schedule, by the step.

    Raises:
        ValueError: if the depth is below 1, there is no loss, or one has a name that is taken.
    """

    network: ShortcutNetwork
    monitor = "val/mse"

    def __init__(
        self,
        network: ShortcutNetwork,
        *,
        losses: dict[str, Loss] | None = None,
        rollout_depth: int = 4,
        compiled: bool = False,
        optimizer: OptimizerCallable = AdamW,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(network, optimizer, scheduler)
        require_at_least(1, rollout_depth=rollout_depth)
        self.losses: dict[str, Loss] = {"mse": MaskedMSE()} if losses is None else losses
        if not self.losses:
            raise ValueError("losses must name at least one loss")
        if taken := sorted(set(self.losses) & set(_OWN_NAMES)):
            raise ValueError(f"losses must not be named {', '.join(taken)}: train/{taken[0]} is logged already")
        self.rollout_depth, self.compiled = rollout_depth, compiled
        if compiled:
            network.compile(fullgraph=True)  # in place: weights keep their names, and sampling with it is faster, too
        self.card: Card | None = None
        self.rollouts: Rollouts | None = None
        self._ends: tuple[RecordedEnds, ...] = ()
        self._masked_before: list[int] = []

    @property
    def ends(self) -> RecordedEnds:
        """What is known of the base from the recorded set."""
        (ends,) = self._ends
        return ends

    @property
    def counts(self) -> list[int]:
        """Tokens that the recorded set commits at each of its N steps."""
        assert self.card is not None
        return tokens_per_step(self.card.decoding["schedule"], self.card.num_steps, self.ends.spec.num_tokens)

    def replay(self, batch: Trajectories) -> Replay:
        """Return ``batch`` in the place of its base."""
        assert self.card is not None
        return Replay(self.ends, batch, Decoding.from_values(self.card.decoding).guidance_by_step)

    def use(self, ends: RecordedEnds) -> None:
        """Train for the base of ``ends``.

        Its interface is frozen and no submodule, since DistributedDataParallel would broadcast its buffers in every
        step; it follows the task in device and precision.
        """
        self._ends = (ends,)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShortcutTask:
        for ends in self._ends:
            ends.interface._apply(fn)  # type: ignore[no-untyped-call]
        moved: ShortcutTask = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def setup(self, stage: str) -> None:
        """Take card and interface from the datamodule, and let the losses take what they need.

        Raises:
            WeightsError: if the network's width is not that of the recorded features, or it is of another kind of base.
            ValueError: if a loss cannot have what it needs, the precision is one that cannot train, or there is no
                compiler for a compiled network.
        """
        if self.compiled:
            require_compiler(self.trainer.strategy.root_device)
        if stage == "fit" and self.trainer.precision == "16-true":
            raise ValueError("trainer.precision: 16-true loses small gradients; train in 16-mixed or bf16-true")
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.card, spec = data.card, TokenSpec(**data.card.spec)
        self.use(RecordedEnds(spec, data.interface, data.card.base_fingerprint))
        if self.network.options.width != spec.width:
            raise WeightsError(
                f"{data.source}: features are {spec.width} wide, but the shortcut network was built for width "
                f"{self.network.options.width}; set model.init_args.network.init_args.width to {spec.width}"
            )
        require_kind(self.network, self.ends, data.source)
        unused, kind = ("window", "an anchored") if self.network.options.anchored else ("max_gap", "no anchored")
        if getattr(data, unused) > 1:
            raise ValueError(
                f"data.{unused} must be 1, since model.network is {kind} network; got {getattr(data, unused)}"
            )
        if data.guided != self.network.options.guided:
            raise ValueError(
                f"data.guided is {str(data.guided).lower()}, and guided of model.network is "
                f"{str(self.network.options.guided).lower()}; they must be the same"
            )
        self._masked_before = [sum(self.counts[step:]) for step in range(1 + data.card.num_steps)]
        self.rollouts = Rollouts(min(self.rollout_depth, data.card.num_steps - 1))

    def network_facts(self) -> dict[str, Any]:
        """The base the network belongs to, and how its trajectories were drawn."""
        return asdict(self.card) | {"base_fingerprint": self.card.base_fingerprint} if self.card else {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what every trained task keeps, unless a loss since the step logged last was not finite.

        Then the weights aren't either, on any rank. Losses are not summed, since a signal of SLURM makes each rank save
        wherever it happens to be.
        """
        if not bool(torch.stack([weights.isfinite().all() for weights in self.network.parameters()]).all()):
            self._require_finite(math.nan)
        super().on_save_checkpoint(checkpoint)

    def forward(
        self, features: Tensor, control: Control, masked_share: Tensor, layout: Layout | None = None, **options: Tensor
    ) -> Tensor:
        """Predict features (B, S, C); see :func:`~lit_shortcut.networks.control.advance`."""
        features, interface = features.to(next(self.network.parameters()).dtype), self.ends.interface
        return advance(self.network, interface, features, control, masked_share, layout, **options)

    def training_step(self, batch: Transition, batch_idx: int) -> Tensor:
        """Loss of one batch of windows, after a depth drawn from 1 to their length.

        Means run over the places of all ranks' batches together: D ranks of batch B train as one of batch D · B does.
        """
        depth = random.Random(f"{self.current_epoch}:{batch_idx}")  # noqa: S311 - the same after a resume
        last = depth.randrange(batch.targets.shape[1])
        prediction, where = self.predict(batch, last), self.where(batch, last)
        terms = self.terms(prediction, batch.targets[:, last], where)
        shares = self._shares(where, batch, last, batch_idx)
        terms = {name: term * shares[self.losses[name].places] for name, term in terms.items()}
        loss = weighted_sum(self.losses, terms)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            found = diagnostics(prediction, batch.features, batch.targets[:, last], where["masked"])
            self._log(terms, {name: value * shares["masked"] for name, value in found.items()})
        return loss

    def predict(self, batch: Transition, last: int) -> Tensor:
        """Features (B, S, C) after step ``last`` of the window, with a gradient through one pass of the network."""
        layout = lay_out_transition(self.network, self.ends.interface, batch)
        features = batch.features
        with torch.no_grad():
            for offset in range(last):
                features = self._advance(features, batch, layout, offset)
        return self._advance(features, batch, layout, last)

    def where(self, batch: Transition, last: int) -> dict[Places, Tensor]:
        """What counts after step ``last`` of the window, by name; see :class:`~lit_shortcut.losses.Loss`."""
        is_masked, used = batch.is_masked[:, last], {loss.places for loss in self.losses.values()}
        where: dict[Places, Tensor] = {"masked": self.ends.interface.masked_rows(is_masked)}
        if "tokens" in used:
            where["tokens"] = masked_tokens(is_masked, batch.num_masked[last] if batch.num_masked else None)
        if "all" in used:
            where["all"] = self._real_rows(batch)
        return where

    def terms(self, prediction: Tensor, target: Tensor, where: dict[Places, Tensor]) -> dict[str, Tensor]:
        """Each loss of ``prediction``, by name and without its weight."""
        interface = self.ends.interface
        return {name: loss(prediction, target, where[loss.places], interface) for name, loss in self.losses.items()}

    @torch.no_grad()
    def validation_step(self, batch: Trajectories, batch_idx: int) -> None:
        """Errors of 1 … K consecutive predictions at each place of each trajectory.

        Trajectories are on the host; a step at a time lies on the device.
        """
        assert self.rollouts is not None
        self.rollouts.update(self.replay(batch), self.network)

    def on_validation_epoch_end(self) -> None:
        """Log the means over the whole validation set, exact over ranks, and each as gain over hold.

        Raises:
            ValueError: if one is not finite.
        """
        assert self.rollouts is not None
        for name, value in self.rollouts.compute().items():
            if not torch.isfinite(value):
                raise ValueError(f"val/{name} is {float(value)} at optimiser step {self.global_step}")
            self.log(f"val/{name}", value, prog_bar=name == "gain", sync_dist=True)  # equal already; Lightning warns

    def _advance(self, features: Tensor, batch: Transition, layout: Layout | None, offset: int) -> Tensor:
        """Predict the window's target at ``offset`` from ``features`` and the tokens committed since."""
        tokens, positions, is_real = batch.control
        control = Control(tokens[:, offset], positions[:, offset], None if is_real is None else is_real[:, offset])
        share, masked = batch.masked_share[:, offset], batch.is_masked[:, offset]
        made: Tensor = self(features, control, share, layout, masked=masked, gap=batch.gap)
        return made

    def _real_rows(self, batch: Transition) -> Tensor:
        """Rows (B, S) that are no padding."""
        if batch.prefix is None:
            return torch.ones_like(batch.features[..., 0], dtype=torch.bool)
        return self.ends.interface.row_places(batch.prefix.lengths, batch.features.shape[1])[1]

    def _shares(
        self, where: dict[Places, Tensor], batch: Transition, last: int, batch_idx: int
    ) -> dict[Places, float | Tensor]:
        """Places of each kind in this rank's batch, relative to the mean over ranks: gradients are means over ranks.

        The schedule fixes how many tokens are masked after each step, and the order of the batches which steps the
        other ranks train on, so that nothing is sent. Where that is not so the numbers are summed over ranks in each
        step: where windows may stand in for damaged ones, where a row of the features stands for several tokens, and
        for all rows where prefixes differ in length.
        """
        ranks, interface = self.trainer.world_size, self.ends.interface
        shares: dict[Places, float | Tensor] = dict.fromkeys(where, 1.0)
        if ranks == 1:
            return shares
        targets_of: Any = getattr(self.trainer.datamodule, "first_targets", None)  # type: ignore[attr-defined]
        epoch = 0 if self.trainer.overfit_batches else self.current_epoch  # type: ignore[attr-defined]
        targets = targets_of(epoch, batch_idx) if targets_of else None
        sent: list[Places] = ["all"] if "all" in where and batch.prefix is not None else []
        if targets is None or interface.num_rows != interface.num_tokens:
            sent += ["masked", "tokens"]
        else:
            left = [sum(self._masked_before[first + last] for first in own) for own in targets]
            share = left[self.trainer.global_rank] * ranks / max(1, sum(left))
            shares |= {"masked": share, "tokens": share}
        if sent:
            masks = where | {"tokens": batch.is_masked[:, last]}
            own = torch.stack([masks[places].sum() for places in sent]).float()
            shares |= dict(zip(sent, own * ranks / sum_over_ranks(own).clamp(min=1), strict=True))
        return shares

    def _log(self, terms: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        """Log means over ranks by one reduction and one read of the device."""
        stacked = torch.stack([*(term.detach() for term in terms.values()), *found.values()]).float()
        means = torch.tensor((sum_over_ranks(stacked) / self.trainer.world_size).tolist())  # on the CPU: not read again
        named = dict(zip(terms, means, strict=False))
        loss = weighted_sum(self.losses, named)
        self._require_finite(float(loss))
        found = dict(zip(found, means[len(terms) :], strict=True))
        self.log_dict({f"train/{name}": value for name, value in named.items()})
        cosine_gain = gain_over_hold(1 - found["cosine"], 1 - found["cosine_hold"])
        self.log_dict({"train/cosine": found["cosine"], "train/cosine_gain": cosine_gain})
        self.log("train/gain", gain_over_hold(found["mse"], found["mse_hold"]))
        self.log("train/loss", loss, prog_bar=True)

    def _require_finite(self, loss: float) -> None:
        """Refuse a loss over all ranks that is not finite: on every rank, as all have the same sum."""
        if not math.isfinite(loss):
            raise ValueError(
                f"training loss is {loss} at optimiser step {self.global_step}, or was since the step logged last: "
                "lower the learning rate or raise the precision (stored features are checked and finite)"
            )
