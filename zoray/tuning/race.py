"""The state of a study: where each trial is, and what each replica holds and does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from zoray.aggregate import Aggregate, ProbeResult
from zoray.commits import Commit
from zoray.tuning.evaluated import Evaluated
from zoray.tuning.grid import Plan, Trial
from zoray.tuning.messages import Finish, Share, Value

BASE = "base"
"""Name of the model as it is, which is evaluated before any trial begins."""

WINDOW = 4
"""Steps whose mean loss shows whether a trial diverges: the loss of one step may be that of a hard batch."""

WELL_ABOVE, ERRORS = 1.5, 4.0
"""A loss is well above the start if it is beyond so many times that and so many standard errors."""


Known = Any
"""What an optimizer knows of the commits so far: its own affair, and a pure function of them."""


class Phase(Enum):
    """What has become of a trial."""

    RUNNING = "running"
    CUT = "cut"
    DIVERGED = "diverged"


@dataclass(frozen=True, slots=True)
class Rules:
    """What the kernel needs of a configuration. All functions are pure.

    Attributes:
        rows: examples of a step, in the first one.
        eval_shards: parts of an evaluation.
        initial: what the optimizer knows before the first step.
        probes: that -> the probes of the next step: directions times microbatches.
        decide: (trial, step, results, previous hash, what the optimizer knows) -> the step's commit and how it came
            about.
        after: (what the optimizer knows, the next commit) -> what it knows then.
        attempts: so often a share may fail, each time on another replica.
    """

    rows: int
    eval_shards: int
    initial: Known
    probes: Callable[[Known], int]
    decide: Callable[[Trial, int, Sequence[ProbeResult], bytes, Known], Aggregate]
    after: Callable[[Known, Commit], Known]
    attempts: int = 3


@dataclass(frozen=True, slots=True)
class Race:
    """One trial, or the model as it is, on its way through the rungs.

    Attributes:
        trial: None for the model as it is.
        step: commits that are durable.
        head: hash of the last one, or of the ledger's header.
        losses: of the commits.
        known: what the optimizer knows of them.
        evaluations: one for each rung it came to the end of.
        why: what ended it, in words.
        cut_in: the rung after which it was cut, if it was.
        open: parts of the work before it that nobody has been given.
        values: what came of the others, by part.
        pending: the next commit, on its way to the disk.
        failures: how often a share of it has failed in a row.
    """

    trial: Trial | None
    step: int
    head: bytes
    losses: tuple[float, ...] = ()
    known: Known = None
    phase: Phase = Phase.RUNNING
    evaluations: tuple[Evaluated, ...] = ()
    why: str = ""
    cut_in: int | None = None
    open: tuple[int, ...] = ()
    values: Mapping[int, Value] = field(default_factory=dict)
    pending: Commit | None = None
    failures: int = 0

    @property
    def name(self) -> str:
        """Of the trial."""
        return BASE if self.trial is None else self.trial.name

    def target(self, plan: Plan) -> int:
        """Steps at the end of the rung that it is in, or was in last."""
        return 0 if self.trial is None else plan.rungs[min(len(self.evaluations), len(plan.rungs) - 1)]


@dataclass(frozen=True, slots=True)
class Worker:
    """A replica: the trial whose weights it has (None: the base weights), at which step, and what it is doing."""

    trial: str | None = None
    step: int = 0
    share: Share | None = None


@dataclass(slots=True)
class Study:
    """Everything the kernel knows. `transition` never changes the one it is given.

    Attributes:
        races: the model as it is, then the trials, by name.
        rung: the one that is being run.
        workers: the replicas, in the order in which they came.
        finish: how it ended.
    """

    plan: Plan
    rules: Rules
    races: dict[str, Race]
    rung: int = 0
    workers: dict[str, Worker] = field(default_factory=dict)
    finish: Finish | None = None

    def copy(self) -> Study:
        """A state that can be changed without touching this one."""
        return replace(self, races=self.races.copy(), workers=self.workers.copy())

    @property
    def base(self) -> Race:
        """The model as it is."""
        return self.races[BASE]

    def running(self) -> list[Race]:
        """What is still in the race: the model as it is until it is evaluated, then trials."""
        if not self.base.evaluations:
            return [self.base]
        return [race for race in self.races.values() if race.trial is not None and race.phase is Phase.RUNNING]

    @property
    def steps_done(self) -> int:
        """Steps of all trials that count for the plan."""
        return sum(min(race.step, race.target(self.plan)) for race in self.races.values())


def divergence(study: Study, race: Race) -> str | None:
    """Why the losses of a trial's steps so far say that it diverges; None if they do not."""
    losses = race.losses[: race.target(study.plan)]
    if not losses:
        return None
    if not math.isfinite(losses[-1]):
        return f"no finite loss in step {len(losses) - 1}"
    recent = losses[-WINDOW:]
    start, mean = max(losses[0], study.base.evaluations[0].loss), math.fsum(recent) / len(recent)
    if mean > _well_above(study, start, len(recent) * study.rules.rows):
        return f"loss {mean:.3g} at step {len(losses)}, {start:.3g} at the start"
    return None


def bad_evaluation(study: Study, evaluated: Evaluated) -> str | None:
    """Why an evaluation says that its trial diverges; None if it does not.

    A trial that is told to be worse than the model as it is has no place among those that learn: it is compared example
    by example, and has to be far beyond chance.
    """
    start = study.base.evaluations[0]
    if not evaluated.finite:
        return "the loss is not finite"
    difference, error = evaluated.above(start)
    worse = difference > ERRORS * error if error == error else evaluated.loss > WELL_ABOVE * start.loss
    return f"loss {evaluated.loss:.3g}, above the {start.loss:.3g} of the model as it is" if worse else None


def _well_above(study: Study, start: float, examples: int) -> float:
    deviation = study.base.evaluations[0].deviation
    noise = 0.0 if math.isnan(deviation) else deviation / math.sqrt(examples)
    return WELL_ABOVE * start + ERRORS * noise
