"""Calibrated plans, read from the file of a search on recorded trajectories (``callbacks/plan_search.py``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from lit_shortcut.acceleration.accelerated import DecideFn, Plan, Predictor
from lit_shortcut.acceleration.plans import Adaptive, Steps
from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import BaseEnds
from lit_shortcut.files import replacing
from lit_shortcut.inputs import located


@dataclass(frozen=True)
class SearchedSteps:
    """Results of the search for one number of steps.

    Args:
        counts: tokens committed at each of the N steps.
        trajectories: number of trajectories searched.
        steps: full steps by budget.
        kl: their cost in nats per image, by budget.
        adaptive: arguments of :class:`~lit_shortcut.acceleration.plans.Adaptive` by budget.
        mean_full_steps: mean number of full steps of these on the trajectories, by budget.
    """

    counts: list[int]
    trajectories: int
    steps: dict[str, list[int]]
    kl: dict[str, float]
    adaptive: dict[str, dict[str, Any]] = field(default_factory=dict)
    mean_full_steps: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanFile:
    """Calibrated plans of one predictor on one base.

    Args:
        predictor: identity of the predictor.
        base_fingerprint: fingerprint of the base that recorded the trajectories.
        schedules: results for each N searched.
    """

    predictor: dict[str, Any]
    base_fingerprint: str
    schedules: list[SearchedSteps]

    @classmethod
    def read(cls, path: Path) -> PlanFile:
        """Read the file at ``path``.

        Raises:
            ValueError: if it is missing, or not a file of calibrated plans.
        """
        try:
            content = json.loads(path.read_text())
            return cls(**content | {"schedules": [SearchedSteps(**one) for one in content["schedules"]]})
        except OSError as error:
            raise ValueError(f"{path}: not readable as a file of calibrated plans ({error.strerror})") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: expected a file of calibrated plans ({error})") from error

    def write(self, path: Path) -> None:
        """Write to ``path`` atomically, keeping schedules of other N in it for the same predictor and base."""
        schedules = self.schedules
        if path.exists():
            earlier = PlanFile.read(path)
            if (earlier.predictor, earlier.base_fingerprint) == (self.predictor, self.base_fingerprint):
                mine = [one.counts for one in schedules]
                schedules = [one for one in earlier.schedules if one.counts not in mine] + schedules
        content = asdict(self) | {"schedules": [asdict(one) for one in schedules]}
        with replacing(path) as aside:
            aside.write_text(json.dumps(content, indent=2) + "\n")


class _FromFile(Plan):
    """A plan of ``budget`` that is looked up once the steps are known."""

    _name: str
    _table: str
    _plan: Callable[[Any], Plan]

    def __init__(self, budget: int, path: Path) -> None:
        require_at_least(1, budget=budget)
        self.budget, self.path = budget, located(path)
        self._file = PlanFile.read(self.path)
        self._digest = sha256(self.path.read_bytes()).hexdigest()[:16]
        self._found: tuple[Predictor, list[int], Plan] | None = None

    def identity(self) -> dict[str, Any]:
        """Name and budget, and a digest of the file."""
        return {"plan": self._name, "budget": self.budget, "file": self._digest}

    def require_base(self, base: BaseEnds) -> None:
        """Raise ValueError if the search ran on trajectories of another base."""
        if base.fingerprint != self._file.base_fingerprint:
            raise ValueError(
                f"{self.path}: plans for base {self._file.base_fingerprint}, not for base {base.fingerprint}"
            )

    def start(self, counts: Sequence[int], predictor: Predictor) -> DecideFn:
        """Decide by the plan in the file.

        Raises:
            ValueError: if the file is for other steps, token counts or another predictor, or lacks the budget.
        """
        return self._entry(counts, predictor).start(counts, predictor)

    def _entry(self, counts: Sequence[int], predictor: Predictor) -> Plan:
        """Look up the entry once: a predictor's identity is a hash of its weights, too slow for every batch."""
        if self._found is None or self._found[0] is not predictor or self._found[1] != list(counts):
            self._found = (predictor, list(counts), self._look_up(counts, predictor))
        return self._found[2]

    def _look_up(self, counts: Sequence[int], predictor: Predictor) -> Plan:
        if (own := predictor.identity()) != self._file.predictor:
            raise ValueError(f"{self.path}: predictor: expected {own}, found {self._file.predictor}")
        found = [one for one in self._file.schedules if one.counts == list(counts)]
        if not found:
            known = [(len(one.counts), one.counts) for one in self._file.schedules]
            same = [held for num_steps, held in known if num_steps == len(counts)]
            wanted = (
                f"{list(counts)} tokens, its plans are for {same[0]}"
                if same
                else (f"{len(counts)} steps, its plans are for {', '.join(str(num_steps) for num_steps, _ in known)}")
            )
            raise ValueError(f"{self.path}: no plan for {wanted}")
        table = getattr(found[0], self._table)
        if str(self.budget) not in table:
            raise ValueError(
                f"{self.path}: no {self._name} plan of budget {self.budget} for {len(counts)} steps; it has budgets "
                f"{', '.join(table) or 'none'}"
            )
        try:
            return self._plan(table[str(self.budget)])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: {self._name} plan of budget {self.budget}: {error}") from error


class Calibrated(_FromFile):
    """The full steps that a search found cheapest for this predictor, N and budget.

    Args:
        budget: b, number of full steps.
        path: file of the search.

    Raises:
        ValueError: if the file is missing, or not a file of calibrated plans.
    """

    _name, _table, _plan = "calibrated", "steps", staticmethod(Steps)


class CalibratedAdaptive(_FromFile):
    """:class:`~lit_shortcut.acceleration.plans.Adaptive` with the threshold found for a mean of ``budget`` full steps.

    Args:
        budget: b, mean number of full steps.
        path: file that the search wrote.

    Raises:
        ValueError: if the file is missing, or not a file of calibrated plans.
    """

    reads_features = True
    _name, _table = "calibrated adaptive", "adaptive"
    _plan = staticmethod(lambda found: Adaptive(**found))
