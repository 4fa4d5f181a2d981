"""Rows, spelled like lines of a table: ``[8]``, ``[16, 4, shortcut]``, ``[16, 4, hold, {guidance: 1}]``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lit_shortcut.acceleration.accelerated import Accelerated, Plan, Predictor, Vanilla
from lit_shortcut.acceleration.plans import Early, Even, Steps
from lit_shortcut.bounds import require_in_steps
from lit_shortcut.contracts import Acceleration
from lit_shortcut.sampling import Decoding

NamedPlan = Plan | Callable[[int], Plan]
"""A plan with a budget of its own, or a function from a row's budget to its plan."""

RowEntry = tuple[Any, ...]
"""A row in YAML. A tuple, since ``rows+:`` in a second YAML would append to inner lists, too."""

VANILLA = "vanilla"
TRAINED = "shortcut"
"""Method in rows of a fit: the network being trained."""

EVEN = "even"
KNOWN_PLANS: dict[str, NamedPlan] = {EVEN: Even, "early": Early}

_FORM = (
    "expected [N] for vanilla, [N, b, method], [N, b, method, plan] or [N, [0, …], method] with the full steps, "
    "each with a mapping of decoding fields at its end where they differ"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Row:
    """One way to decode.

    Args:
        name: name in logs and files: ``vanilla_n8``, ``shortcut_n16_b4_early``.
        method: label in tables.
        decoding: settings that tokens are drawn with.
        acceleration: computes the features of each step.
        budget: b, the row's number of full steps; N for vanilla.
        plan: name of the plan; empty for vanilla.
        overrides: fields of the decoding set by this row, by name.
    """

    name: str
    method: str
    decoding: Decoding
    acceleration: Acceleration = field(default_factory=Vanilla)
    budget: int = 0
    plan: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> str:
        """Return the row's own decoding settings for a table: ``halton, guidance 1``."""
        return ", ".join(
            str(value) if name == "order" else f"{name} {_shown(value)}" for name, value in self.overrides.items()
        )

    def entry(self) -> dict[str, Any]:
        """Return the row's columns in a table, as JSON values."""
        return {
            "name": self.name,
            "method": self.method,
            "N": self.decoding.num_steps,
            "budget": self.budget,
            "plan": self.plan,
            "decoding": self.settings,
        }


def build_rows(
    rows: Sequence[Sequence[Any]],
    decoding: Decoding,
    methods: Mapping[str, Predictor] | None = None,
    plans: Mapping[str, NamedPlan] | None = None,
) -> list[Row]:
    """Build rows from their YAML entries.

    Args:
        rows: ``[N]`` is vanilla in N steps; ``[N, b, method]`` runs the base at b of them, spread evenly, and the
            method at the others; a fourth entry names another plan; a list in place of b lists the full steps. A
            mapping at the end overrides fields of ``decoding``.
        decoding: settings of all rows but the number of steps.
        methods: predictors by name.
        plans: plans by name; ``even`` and ``early`` are always known.

    Raises:
        ValueError: if a row is malformed, names an unknown method, plan or field, or has a budget outside 1..N; if two
            rows are equal; or if a name cannot be part of a file name.
    """
    methods, plans = methods or {}, KNOWN_PLANS | dict(plans or {})
    for name in (*methods, *plans):
        if not _NAME.fullmatch(name) or name == VANILLA:
            raise ValueError(
                f"names of methods and plans may have letters, digits and _ . - and must not be vanilla; got {name!r}"
            )
    built = []
    for entry in rows:
        with naming(f"row {list(entry) if isinstance(entry, Sequence) and not isinstance(entry, str) else entry!r}"):
            built.append(_build(entry, decoding, methods, plans))
    twice = [name for name, count in Counter(row.name for row in built).items() if count > 1]
    if twice:
        raise ValueError(f"rows must differ from one another; more than one are {', '.join(twice)}")
    return built


def require_others(methods: Iterable[str]) -> None:
    """Raise ValueError if one of ``methods``, given beside the network being trained, has its name."""
    if TRAINED in methods:
        raise ValueError(f"methods must not name {TRAINED!r}, which is the network being trained")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Put ``what`` before the message of a ValueError that is raised within."""
    try:
        yield
    except ValueError as error:
        error.args = (f"{what}: {error}",)
        raise


def vanilla_row(decoding: Decoding) -> Row:
    """Return the row that runs the base at every step of ``decoding``."""
    (row,) = build_rows([[decoding.num_steps]], decoding)
    return row


def modules_of(rows: Iterable[Row]) -> nn.ModuleList:
    """Return the accelerations that are modules, for a task to hold and so move their networks."""
    return nn.ModuleList(row.acceleration for row in rows if isinstance(row.acceleration, nn.Module))


def _build(
    entry: Sequence[Any], decoding: Decoding, methods: Mapping[str, Predictor], plans: Mapping[str, NamedPlan]
) -> Row:
    if isinstance(entry, str) or not isinstance(entry, Sequence):
        raise ValueError(_FORM)
    parts, overrides = list(entry), {}
    if parts and isinstance(parts[-1], Mapping):
        overrides = dict(parts.pop())
    match parts:
        case [int(num_steps)]:
            own = _override(decoding, num_steps, overrides)
            return Row(_name(VANILLA, num_steps, "", overrides), VANILLA, own, Vanilla(), num_steps, "", overrides)
        case [int(num_steps), int() | list() as budget, str(method)]:
            plan = "" if isinstance(budget, list) else EVEN
        case [int(num_steps), int(budget), str(method), str(plan)]:
            pass
        case _:
            raise ValueError(_FORM)
    if method not in methods:
        raise ValueError(f"no method is named {method!r}; known are {_list(methods)}")
    if plan and plan not in plans:
        raise ValueError(f"no plan is named {plan!r}; known are {_list(plans)}")
    if not isinstance(budget, list):
        require_in_steps(num_steps, budget=budget)
    own = _override(decoding, num_steps, overrides)
    made: Plan
    if isinstance(budget, list):
        label, count, made = f"steps{'-'.join(map(str, budget))}", len(budget), _steps(budget)
    else:
        known = plans[plan]
        if isinstance(known, Plan) and type(has := known.identity().get("budget")) is int and has != budget:
            raise ValueError(f"budget must be {has}, that of the plan named {plan!r}; got {budget}")
        label, count, made = plan, budget, known if isinstance(known, Plan) else known(budget)
    suffix = f"_b{count}" + (f"_{label}" if label != EVEN else "")
    name = _name(method, num_steps, suffix, overrides)
    return Row(name, method, own, Accelerated(made, methods[method]), count, label, overrides)


def _steps(steps: list[Any]) -> Steps:
    if not all(type(step) is int for step in steps):
        raise ValueError(f"steps must be whole numbers, got {steps}")
    return Steps(steps)


def _override(decoding: Decoding, num_steps: int, overrides: dict[str, Any]) -> Decoding:
    if "num_steps" in overrides:
        raise ValueError("num_steps is the row's first number")
    return decoding.replaced(overrides | {"num_steps": num_steps})


def _name(method: str, num_steps: int, suffix: str, overrides: Mapping[str, Any]) -> str:
    own = (f"_{'' if name == 'order' else name}{_shown(value)}" for name, value in overrides.items())
    return f"{method}_n{num_steps}{suffix}{''.join(own)}"


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "-".join(f"{name}{_shown(own)}" for name, own in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
