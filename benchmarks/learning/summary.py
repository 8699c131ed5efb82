"""What the runs of one task and method amount to. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.learning.runs import EVALUATION, TUNING, Outcome, Results, Run, mean_final, tuned
from benchmarks.learning.statistics import Estimate, estimate, first_below, paired

LOSS, ACCURACY = 2, 3


@dataclass(frozen=True, slots=True)
class Cell:
    """One method on one task.

    Attributes:
        tuning: the rates that were tried and the mean held-out loss each came to, infinite where a seed diverged.
        rate: the best of them; None while the grid is not whole.
        outcomes: by seed, the runs at that rate that are reported.
    """

    tuning: dict[float, float]
    rate: float | None
    outcomes: dict[int, Outcome]

    @property
    def finals(self) -> dict[int, float]:
        """Held-out loss at the end, by seed."""
        return {seed: outcome.final for seed, outcome in self.outcomes.items()}

    def final(self, column: int = LOSS) -> Estimate:
        """Held-out loss (or accuracy) at the end of the runs that did not diverge."""
        return estimate([o.curve[-1][column] for o in self.outcomes.values() if not o.diverged])

    @property
    def lasting(self) -> bool:
        """Whether there is a run that did not diverge."""
        return any(not outcome.diverged for outcome in self.outcomes.values())

    @property
    def diverged(self) -> int:
        """Reported runs that diverged."""
        return sum(outcome.diverged for outcome in self.outcomes.values())

    def curve(self, column: int = LOSS) -> tuple[list[float], list[Estimate]]:
        """Forward passes, and the mean over the seeds of what was measured there."""
        lasting = [outcome.curve for outcome in self.outcomes.values() if not outcome.diverged]
        points = zip(*lasting, strict=True)
        found = [(each[0][0], estimate([point[column] for point in each])) for each in points]
        return [passes for passes, _ in found], [value for _, value in found]


def cell(results: Results, task: str, method: str) -> Cell:
    """Everything there is of a method on a task."""
    best, rates = tuned(results, task, method)
    means = {rate: mean_final(results, task, method, rate, TUNING) for rate in rates}
    known = {rate: mean for rate, mean in means.items() if mean is not None}
    found: dict[int, Outcome] = {}
    if best is not None:
        found = {s: results[run] for s in EVALUATION if (run := Run(task, method, best, s)) in results}
    return Cell(known, best, found)


def share_to_reach(ours: Cell, theirs: Cell) -> tuple[Estimate | None, int]:
    """Forward passes we take to come to the loss they end at, over those they took; and how many seeds never do.

    The loss is the mean of theirs over the seeds; each of our runs is looked at by itself.
    """
    target = theirs.final().mean
    whole = max(outcome.curve[-1][0] for outcome in theirs.outcomes.values())
    reached = [first_below(*columns(outcome), target) for outcome in ours.outcomes.values()]
    shares = [passes / whole for passes in reached if passes is not None]
    return (estimate(shares) if shares else None), reached.count(None)


def columns(outcome: Outcome) -> tuple[list[float], list[float]]:
    """Forward passes and held-out losses of a run."""
    return [point[0] for point in outcome.curve], [point[LOSS] for point in outcome.curve]


def difference(ours: Cell, theirs: Cell) -> Estimate | None:
    """Our held-out loss at the end minus theirs, seed by seed, where neither diverged; None if no seed is in both."""
    return paired(_lasting(ours), _lasting(theirs))


def _lasting(one: Cell) -> dict[int, float]:
    return {seed: final for seed, final in one.finals.items() if math.isfinite(final)}
