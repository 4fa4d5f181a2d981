"""Train a shortcut network on recorded trajectories (arXiv 2602.23996, section 3; method of the published weights)."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import MeanMetric

from lit_shortcut.contracts import Control, Prefix, TokenSpec, Trajectories, Transition
from lit_shortcut.interface import TokenInterface
from lit_shortcut.metrics.functional import (
    centred_cosine,
    gain_over_hold,
    head_kl,
    masked_cosine,
    masked_mean,
    masked_mse,
    token_agreement,
)
from lit_shortcut.networks.control import embed_control, lay_out, require_kind
from lit_shortcut.networks.shortcut import VelocityNet
from lit_shortcut.tasks.optimized import OptimizedTask
from lit_shortcut.trajectory import Card
from lit_shortcut.weights import WeightsError

_MEASURES = ("cosine", "cosine_centred", "head_kl", "token_agreement")  # of one step, beside the errors of several


class ShortcutTask(OptimizedTask):
    """Regress the average velocity: mean squared error of the next features at places still masked.

    Validation repeats the prediction 1 … ``rollout_depth`` steps in a row along each recorded trajectory and compares
    with "hold" (the last base features again): ``val/gain`` is 1 − MSE / MSE of hold, after one step, and
    ``val/rollout_gain_k`` after k.

    Args:
        network: the shortcut to train.
        kl_weight: weight of T²·KL(head(target)/T ‖ head(prediction)/T); 0 leaves it out, as published.
        kl_temperature: T.
        standardised: divide the error of each channel by the standard deviation of its velocity before squaring, so
            that loud channels do not drown the others; false is the published raw error. ``train/mse`` is in the same
            units, ``val/mse`` always raw.
        rows: which rows of the features the loss counts: places still ``masked`` (MaskGIT), or ``all`` (DiMOO).
        rollout_depth: K, consecutive shortcut steps in validation. In training the depth is drawn from 1 to the
            datamodule's window, and the gradient runs through the last step alone.
        compiled: run the network through ``torch.compile``.
        optimizer: makes the optimiser from parameters.
        scheduler: makes the learning-rate schedule, by the step.
    """

    network: VelocityNet
    interface: TokenInterface
    channel_scale: Tensor

    def __init__(
        self,
        network: VelocityNet,
        *,
        kl_weight: float = 0.0,
        kl_temperature: float = 1.0,
        standardised: bool = False,
        rows: Literal["masked", "all"] = "masked",
        rollout_depth: int = 4,
        compiled: bool = False,
        optimizer: OptimizerCallable = AdamW,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        if rollout_depth < 1:
            raise ValueError(f"rollout_depth must be at least 1, got {rollout_depth}")
        self.network = network
        self.kl_weight, self.kl_temperature = kl_weight, kl_temperature
        self.standardised, self.rows, self.rollout_depth = standardised, rows, rollout_depth
        if compiled:
            network.compile()  # in place: weights keep their names, and what samples with the network is faster, too
        self.card: Card | None = None
        self.sums = nn.ModuleDict()

    def setup(self, stage: str) -> None:
        """Take card, interface and channel scales from the datamodule.

        Raises:
            WeightsError: if the network's width is not that of the recorded features, or it is of another kind of base.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.card, self.interface = data.card, data.interface
        width = TokenSpec(**data.card.spec).width
        if self.network.hparams["width"] != width:
            raise WeightsError(
                f"{data.source}: features are {width} wide, but the shortcut network was built for width "
                f"{self.network.hparams['width']}; set model.init_args.network.init_args.width to {width}"
            )
        require_kind(self.network, self.interface, data.source)
        scale = data.velocity_scale() if self.standardised else torch.ones(width)
        self.register_buffer("channel_scale", scale, persistent=False)
        depths = range(2, 1 + min(self.rollout_depth, self.card.num_steps - 1))
        names = ["mse", *(f"rollout_mse_{k}" for k in depths), *_MEASURES]
        self.sums = nn.ModuleDict(
            {name + suffix: MeanMetric(nan_strategy="error") for name in names for suffix in ("", "_hold")}
        )

    def network_facts(self) -> dict[str, Any]:
        """The base the network belongs to, and how its trajectories were drawn."""
        return asdict(self.card) if self.card else {}

    def forward(self, features: Tensor, control: Control, masked_share: Tensor, text: Prefix | None = None) -> Tensor:
        """Features after one step, (B, S, C), from those before, ``control`` (B, K) and ``masked_share`` (B,)."""
        layout = None if text is None else lay_out(self.interface, text, features.shape[-2])
        embedded = embed_control(self.interface, control, layout)
        following: Tensor = self.network(
            features, embedded.tokens.to(features), masked_share, embedded.is_real, embedded.places
        )
        return following

    def training_step(self, batch: Transition, batch_idx: int) -> Tensor:
        """Loss of one batch of windows, after a depth drawn from 1 to their length.

        Means run over the places of all ranks' batches together: D ranks of batch B train as one of batch D · B does.
        """
        depth = random.Random(f"{self.current_epoch}:{batch_idx}")  # noqa: S311 - the same after a resume
        last = depth.randrange(batch.targets.shape[1])
        terms, counts = self.terms(batch, last)
        terms = terms * (counts / self._mean_over_ranks(counts).clamp(min=1))  # as gradients are means over ranks
        self._require_finite(terms[0], batch)
        mse, hold, kl, cosine, held_cosine = self._mean_over_ranks(terms)
        self.log("train/mse", mse)
        self.log("train/gain", gain_over_hold(mse, hold))
        self.log_dict({"train/cosine": cosine, "train/cosine_gain": gain_over_hold(1 - cosine, 1 - held_cosine)})
        if self.kl_weight:
            self.log("train/head_kl", kl)
        self.log("train/loss", mse + self.kl_weight * kl, prog_bar=True)
        return terms[0] + self.kl_weight * terms[2]

    def terms(self, batch: Transition, last: int) -> tuple[Tensor, Tensor]:
        """Measures after step ``last`` of the window, and how many places each counts, both (5,).

        They are error, error of hold, the head's KL (0 where it has no weight), and cosine of prediction and of hold.
        """
        features = batch.features.float()
        rolled = features
        with torch.no_grad():
            for offset in range(last):
                rolled = self._advance(rolled, batch, offset)
        prediction, target = self._advance(rolled, batch, last), batch.targets[:, last].float()
        is_masked = batch.is_masked[:, last]
        counted = is_masked if self.rows == "masked" else self._real_rows(batch)
        error, hold = self._error(prediction, target, counted), self._error(features, target, counted)
        kl = self._head_kl(prediction, target, is_masked) if self.kl_weight else torch.zeros_like(error)
        cosines = [masked_cosine(guess.detach(), target, is_masked) for guess in (prediction, features)]
        places, masked_places = counted.sum(), is_masked.sum()
        counts = torch.stack([places, places, masked_places, masked_places, masked_places])
        return torch.stack([error, hold, kl, *cosines]), counts.to(error)

    def validation_step(self, batch: Trajectories, batch_idx: int) -> None:
        """Errors of 1 … K consecutive predictions at each place of each trajectory."""
        features = batch.features.flatten(0, 1)  # (B·G, N, S, C), gigabytes in large models: float32 step by step
        branches, num_steps = batch.features.shape[1], features.shape[1]
        committed_at = batch.committed_at.repeat_interleave(branches, dim=0)
        tokens = batch.tokens.repeat_interleave(branches, dim=0)
        # of a trajectory's own places, whatever the batch
        centre = features[:, :, : tokens.shape[1]].mean(dim=(1, 2), dtype=torch.float32)[:, None]
        text = None if batch.prefix is None else Prefix(*(part.flatten(0, 1) for part in batch.prefix))
        rolled: list[Tensor] = []  # rolled[k]: present features after k consecutive predictions
        for step in range(num_steps - 1):
            rolled = [features[:, step].float(), *rolled][: self.rollout_depth]
            control = _committed(tokens, committed_at, step)
            is_masked = committed_at > step
            share = is_masked.float().mean(dim=1)
            depths = len(rolled)
            repeated = Control(*(part.repeat(depths, 1) for part in control[:2]))
            repeated_text = text and Prefix(
                text.lengths.repeat(depths), text.control.repeat(depths, 1, 1), text.num_control.repeat(depths)
            )
            rolled = list(self(torch.cat(rolled), repeated, share.repeat(depths), repeated_text).chunk(depths))
            held = [features[:, step - k].float() for k in range(depths)]
            self._add(rolled, held, features[:, step + 1].float(), is_masked, centre)

    def on_validation_epoch_end(self) -> None:
        """Log the means over the whole validation set, exact over ranks, and each as gain over hold."""
        mean = {name: metric.compute() for name, metric in self.sums.items()}  # type: ignore[operator]
        for metric in self.sums.values():
            metric.reset()  # type: ignore[operator]
        logged = {name: value for name, value in mean.items() if not name.startswith("rollout")}
        for k in range(2, self.rollout_depth + 1):
            if f"rollout_mse_{k}" in mean:
                logged[f"rollout_mse_{k}"] = mean[f"rollout_mse_{k}"]
                logged[f"rollout_gain_{k}"] = gain_over_hold(mean[f"rollout_mse_{k}"], mean[f"rollout_mse_{k}_hold"])
        logged["gain"] = gain_over_hold(mean["mse"], mean["mse_hold"])
        for cosine in ("cosine", "cosine_centred"):
            logged[f"{cosine}_gain"] = gain_over_hold(1 - mean[cosine], 1 - mean[f"{cosine}_hold"])
        logged["head_kl_gain"] = gain_over_hold(mean["head_kl"], mean["head_kl_hold"])
        for name, value in logged.items():
            self.log(f"val/{name}", value, prog_bar=name == "gain", sync_dist=True)  # equal already; Lightning warns

    def _advance(self, features: Tensor, batch: Transition, offset: int) -> Tensor:
        is_real = None if batch.control.is_real is None else batch.control.is_real[:, offset]
        control = Control(batch.control.tokens[:, offset], batch.control.positions[:, offset], is_real)
        following: Tensor = self(features, control, batch.masked_share[:, offset], batch.prefix)
        return following

    def _error(self, prediction: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        if self.standardised:
            prediction, target = prediction / self.channel_scale, target / self.channel_scale
        return masked_mse(prediction, target, counted)

    def _head_kl(self, prediction: Tensor, target: Tensor, is_masked: Tensor) -> Tensor:
        """Mean over masked places; the head runs on those alone."""
        places = is_masked.nonzero()[:, 1]
        wanted, guessed = (
            self.interface.row_logits(features[:, : is_masked.shape[1]][is_masked], places)
            for features in (target, prediction)
        )
        kl = head_kl(wanted, guessed, self.kl_temperature)
        return kl.sum() / max(1, len(kl))

    def _real_rows(self, batch: Transition) -> Tensor:
        """Rows (B, S) that are no padding."""
        count, num_rows = batch.features.shape[:2]
        if batch.prefix is None:
            return torch.ones(count, num_rows, dtype=torch.bool, device=batch.features.device)
        return self.interface.row_places(batch.prefix.lengths, num_rows)[1]

    def _add(self, rolled: list[Tensor], held: list[Tensor], target: Tensor, is_masked: Tensor, centre: Tensor) -> None:
        """Add this step's errors to the running means, weighted by the number of places they are means of."""
        weight = is_masked.sum()
        values = {}
        for k, (prediction, hold) in enumerate(zip(rolled, held, strict=True), start=1):
            name = "mse" if k == 1 else f"rollout_mse_{k}"
            values[name] = masked_mse(prediction, target, is_masked)
            values[f"{name}_hold"] = masked_mse(hold, target, is_masked)
        target_logits = self.interface.logits(target)
        for suffix, guess in (("", rolled[0]), ("_hold", held[0])):
            logits = self.interface.logits(guess)
            values[f"cosine{suffix}"] = masked_cosine(guess, target, is_masked)
            values[f"cosine_centred{suffix}"] = centred_cosine(guess, target, is_masked, centre)
            values[f"head_kl{suffix}"] = masked_mean(head_kl(target_logits, logits), is_masked)
            values[f"token_agreement{suffix}"] = token_agreement(logits, target_logits, is_masked)
        for name, value in values.items():
            self.sums[name].update(value, weight)  # type: ignore[operator]

    def _mean_over_ranks(self, values: Tensor) -> Tensor:
        reduced = self.trainer.strategy.reduce(values.detach().clone(), reduce_op="mean")  # works in place
        assert isinstance(reduced, Tensor)
        return reduced

    def _require_finite(self, loss: Tensor, batch: Transition) -> None:
        if not torch.isfinite(loss):
            raise ValueError(
                f"training loss is {loss.item()} at optimiser step {self.global_step}, in a batch of steps "
                f"{sorted(set(batch.step.tolist()))}: lower the learning rate or the precision's risk "
                "(the stored features were checked and are finite)"
            )


def _committed(tokens: Tensor, committed_at: Tensor, step: int) -> Control:
    """The tokens each trajectory committed at ``step``: equally many in all, the schedule fixes their number."""
    places = (committed_at == step).nonzero()[:, 1].unflatten(0, (len(tokens), -1))
    return Control(tokens.gather(1, places), places)
