"""One run, the grid of runs, and which is missing next. Pure but for `train`, which trains."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.learning import tasks
from benchmarks.learning.methods import METHODS
from benchmarks.learning.tasks import Task
from zoray.errors import NumericsError

TUNING = (101,)
"""Seeds that choose the learning rate."""
EVALUATION = (1, 2, 3, 4, 5)
"""Seeds that are reported."""
RATES = 5
FACTOR = math.sqrt(10)
EXTENSIONS = 3
"""Rates that are added, one at a time, while the best is at an edge of the grid."""
DIVERGED = 1.5
"""A run whose held-out loss is this many times that of the start is stopped."""

Point = tuple[float, float, float, float]
"""Forward passes so far, training loss since the point before (nan at the start), held-out loss and accuracy."""
Spread = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """What one line of the results is of."""

    task: str
    method: str
    rate: float
    seed: int

    @property
    def versions(self) -> tuple[int, int]:
        """Of the task and the method: lines of others do not count."""
        return tasks.VERSIONS[self.task], METHODS[self.method].version


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        curve: the points measured, the first before any step.
        diverged: whether it was stopped for that; the curve then ends early.
    """

    curve: tuple[Point, ...]
    diverged: bool

    @property
    def final(self) -> float:
        """Held-out loss at the end; infinite if it diverged."""
        return math.inf if self.diverged else self.curve[-1][2]


Results = Mapping[Run, Outcome]


def train(run: Run) -> tuple[Outcome, float]:
    """Make the run, from the pretrained weights to the end of its budget; returns its seconds too."""
    task, method = tasks.get(run.task), METHODS[run.method]
    started = time.perf_counter()
    # Adapters and dropout aside, nothing may draw from torch's own generator; a run must not depend on those before it.
    torch.manual_seed(run.seed)
    model = task.adapted() if method.adapters else task.model()
    budget = task.budget * method.share
    curve: list[Point] = [(0, math.nan, *task.evaluate(model))]
    step = method.start(model, lambda index: task.batch(run.seed, index, method.rows), run.seed, task.texts)
    losses: list[float] = []
    passes, number = 0.0, 0
    while passes < budget:
        rate = run.rate * (1 - passes / budget if method.schedule == "linear" else 1)
        try:
            losses.append(step(number, rate))
        except NumericsError:
            return Outcome(tuple(curve), True), time.perf_counter() - started
        number += 1
        passes += method.forwards
        if due(passes, method.forwards, task) or passes >= budget:
            curve.append((passes, sum(losses) / len(losses), *task.evaluate(model)))
            losses.clear()
            if not curve[-1][2] <= DIVERGED * curve[0][2]:
                return Outcome(tuple(curve), True), time.perf_counter() - started
    return Outcome(tuple(curve), False), time.perf_counter() - started


def due(passes: float, added: float, task: Task) -> bool:
    """Whether one of the points at which a task is measured lies within the last `added` forward passes."""
    return passes // task.interval > (passes - added) // task.interval


def grid(middle: float, count: int = RATES, factor: float = FACTOR) -> list[float]:
    """Rates around the middle, each `factor` times the one before, to three digits: they are part of a run's name."""
    return [float(f"{middle * factor ** (index - count // 2):.3g}") for index in range(count)]


def mean_final(results: Results, task: str, method: str, rate: float, seeds: Iterable[int]) -> float | None:
    """Mean of the held-out losses at the end over the seeds that are there; None if there is none."""
    found = [results[run].final for seed in seeds if (run := Run(task, method, rate, seed)) in results]
    return sum(found) / len(found) if found else None


def tuned(results: Results, task: str, method: str) -> tuple[float | None, list[float]]:
    """The best rate of a grid whose tuning runs are all there, else None; and the rates it wants.

    First a coarse grid, which grows while its best is at an edge; then the two rates halfway to its neighbours.
    """
    if (fixed := METHODS[method].fixed) is not None:
        return fixed, [fixed]
    rates = grid(METHODS[method].middle(tasks.get(task)))
    best = _best(results, task, method, rates)
    while best in (rates[0], rates[-1]) and len(rates) < RATES + EXTENSIONS:
        rates = sorted({*rates, grid(best, 3)[0 if best == rates[0] else 2]})
        best = _best(results, task, method, rates)
    if best is None:
        return None, rates
    rates = sorted({*rates, *grid(best, 3, math.sqrt(FACTOR))})
    return _best(results, task, method, rates), rates


def _best(results: Results, task: str, method: str, rates: Sequence[float]) -> float | None:
    """The rate with the least mean loss, the smaller of two that are equal; None if a tuning run is missing."""
    if not all(Run(task, method, rate, seed) in results for rate in rates for seed in TUNING):
        return None
    return min(rates, key=lambda rate: (mean_final(results, task, method, rate, TUNING), rate))


def wanted(results: Results, cells: Sequence[tuple[str, str]], flying: Iterable[Run] = ()) -> Iterator[Run]:
    """Runs that are neither there nor on their way, in the order they should be made.

    Cells (task, method) come one after the other: first the tuning runs of one, then its evaluation.
    """
    busy = set(flying)
    for task, method in cells:
        best, rates = tuned(results, task, method)
        if best is None:
            runs = [Run(task, method, rate, seed) for seed in TUNING for rate in rates]
        else:
            runs = [Run(task, method, best, seed) for seed in EVALUATION]
        yield from (run for run in runs if run not in results and run not in busy)
