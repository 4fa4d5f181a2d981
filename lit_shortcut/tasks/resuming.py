"""Resuming a training whose YAML changed: settings come from the YAML, states from the checkpoint."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_KEY = "settings"  # of a checkpoint


def settings_of(optimizer: Optimizer, scheduler: LRScheduler | None) -> dict[str, Any]:
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


def prefer(settings: dict[str, Any], checkpoint: dict[str, Any], where: str) -> None:
    """Put the ``settings`` that differ from the checkpoint's own into its states.

    A changed learning rate scales the present one. A schedule may be extended or get other milestones; the first step
    still has the rate that the checkpoint was about to use.

    Raises:
        ValueError: if the optimiser or the schedule is of another class.
    """
    earlier = checkpoint.get(_KEY)
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
    for schedule in checkpoint["lr_schedulers"]:
        for name in _changed(settings["schedule"], earlier["schedule"]):
            schedule[name] = deepcopy(settings["schedule"][name])
    store(settings, checkpoint)


def _changed(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    return [name for name, value in now.items() if name not in before or before[name] != value]
