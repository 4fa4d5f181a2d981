"""Resuming a training whose YAML changed: settings come from the YAML, states from the checkpoint."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

_KEY = "settings"  # of a checkpoint


def yaml_settings(optimizer: Optimizer, scheduler: LRScheduler | None) -> dict[str, Any]:
    """Return the YAML's settings of a new ``optimizer`` and its ``scheduler``, before their first step."""
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    return {
        "optimizer": type(optimizer).__name__,
        "scheduler": type(scheduler).__name__,
        "groups": deepcopy(groups),
        "schedule": {} if scheduler is None else deepcopy(scheduler.state_dict()),
    }


def store(settings: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Put ``settings`` into ``checkpoint``."""
    checkpoint[_KEY] = settings


def prefer(optimizer: Optimizer, scheduler: LRScheduler | None, checkpoint: dict[str, Any], where: str) -> None:
    """Put what a new ``optimizer`` and its ``scheduler`` have set otherwise than the checkpoint into its states.

    With a schedule or a learning rate that changed, a run goes on at the rate that it would have had with them from its
    beginning. Only a schedule that reacts to a plateau keeps the present rate, scaled by the learning rate's change.

    Raises:
        ValueError: if the optimiser or the schedule is of another class.
    """
    earlier, settings = checkpoint.get(_KEY), yaml_settings(optimizer, scheduler)
    if earlier is None:
        return
    for name in ("optimizer", "scheduler"):
        if settings[name] != earlier[name]:
            raise ValueError(
                f"{where}: trained with {name} {earlier[name]}, model.{name} is {settings[name]}; "
                "a resumed run goes on with the same class"
            )
    for state in checkpoint["optimizer_states"]:
        for group, now, before in zip(state["param_groups"], settings["groups"], earlier["groups"], strict=True):
            for name in _changed(now, before):
                group[name] = group["lr"] * now["lr"] / before["lr"] if name == "lr" and before["lr"] else now[name]
    replaced = _changed(settings["schedule"], earlier["schedule"])
    if isinstance(scheduler, ReduceLROnPlateau):
        for name in replaced:
            checkpoint["lr_schedulers"][0][name] = deepcopy(settings["schedule"][name])
    elif scheduler is not None and replaced:
        _step(scheduler, checkpoint["lr_schedulers"][0]["last_epoch"])
        checkpoint["lr_schedulers"] = [scheduler.state_dict()]
        for state in checkpoint["optimizer_states"]:
            for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
                group["lr"] = own["lr"]
    store(settings, checkpoint)


def _step(scheduler: LRScheduler, times: int) -> None:
    with warnings.catch_warnings():  # torch expects a step of the optimiser before each
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(times):
            scheduler.step()


def _changed(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    return [name for name, value in now.items() if name not in before or before[name] != value]
