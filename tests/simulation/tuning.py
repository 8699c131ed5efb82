"""A study carried out in one thread, on replicas that die and answer in any order; the losses are a formula.

The loss of an example is `(log10(rate) - log10(best))^2 + what the example adds`, less the further the trial is, and a
rate above `wild` diverges. So it is known which trial must win.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from zoray.aggregate import Aggregate, ProbeResult, aggregate
from zoray.commits import Commit
from zoray.tuning import (
    BASE,
    Answered,
    AppendCommit,
    Assign,
    CommitDurable,
    Evaluated,
    Event,
    Finish,
    Note,
    Plan,
    ReplicaLost,
    ReplicaReady,
    Rules,
    Share,
    ShareFailed,
    Study,
    Trial,
    begin,
    transition,
)

GENESIS = bytes(32)
DIRECTIONS, SHARDS, EXAMPLES = 3, 2, 6


def decide(trial: Trial, step: int, results: object, previous: bytes, known: int) -> Aggregate:
    return aggregate(
        step,
        results,
        directions=DIRECTIONS + known % 2,
        microbatches=1,
        learning_rate=trial.learning_rate,
        previous=previous,
    )  # type: ignore[arg-type]


RULES = Rules(8 * DIRECTIONS, SHARDS, 0, lambda known: DIRECTIONS + known % 2, decide, lambda known, commit: known + 1)
"""Of an optimizer that counts steps, and has one more direction in every second one."""


def noise(*address: object) -> float:
    """In [0, 1), a pure function of an address."""
    return int.from_bytes(hashlib.sha256(repr(address).encode()).digest()[:6], "big") / 2**48


@dataclass(frozen=True)
class World:
    """What the losses are."""

    best: float = 1e-4
    wild: float = math.inf
    spread: float = 0.5

    def loss(self, trial: Trial | None, step: int) -> float:
        if trial is None or step == 0:
            return 3.0
        if trial.learning_rate > self.wild:
            return math.nan if trial.learning_rate > 2 * self.wild else 40.0
        away = math.log10(trial.learning_rate) - math.log10(self.best)
        return 1.0 + 2.0 * (1 - 0.1 * step / (1 + 0.1 * step) * math.exp(-(away**2)))

    def values(self, trial: Trial | None, share: Share) -> tuple[ProbeResult | Evaluated, ...]:
        loss = self.loss(trial, share.step)
        if share.evaluating:
            rows = EXAMPLES // SHARDS
            name = None if trial is None else trial.name
            return tuple(
                Evaluated(
                    tuple(
                        loss + self.spread * noise(i) + 1e-4 * noise(name, i) for i in range(p * rows, p * rows + rows)
                    )
                )
                for p in share.parts
            )
        assert trial is not None
        return tuple(
            ProbeResult(share.step, k, 0, noise(trial.name, share.step, k) - 0.5, loss + 0.1 * noise(share.step, k))
            for k in share.parts
        )


@dataclass
class Carrier:
    """What the actors and the disk are to the kernel: it keeps ledgers and evaluations, and checks every assignment."""

    plan: Plan
    world: World = field(default_factory=World)
    ledgers: dict[str, list[Commit]] = field(default_factory=dict)
    evaluations: dict[str, list[Evaluated]] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    switches: int = 0

    def __post_init__(self) -> None:
        self.trials: Mapping[str, Trial | None] = {BASE: None, **{each.name: each for each in self.plan.trials}}
        self.ledgers = {each.name: [] for each in self.plan.trials}

    def run(self, replicas: int, seed: int = 0, deaths: float = 0.0, steps: int | None = None) -> Study:
        """Until the study is over, or for so many events."""
        choice = random.Random(seed)
        known = {name: (GENESIS, commits) for name, commits in self.ledgers.items()}
        study = begin(self.plan, RULES, known, self.evaluations)
        held: dict[str, tuple[str | None, int]] = {}
        busy: dict[str, Share] = {}
        born = 0
        while study.finish is None and (steps is None or steps > 0):
            steps = None if steps is None else steps - 1
            while len(held) < replicas:
                name, born = f"r{born}", born + 1
                held[name] = None, 0
                study = self._do(study, ReplicaReady(name), held, busy)
            assert busy, "nobody has anything to do"
            name = choice.choice(sorted(busy))
            share = busy.pop(name)
            if choice.random() < deaths:
                del held[name]
                event: Event = ReplicaLost(name) if choice.random() < 0.7 else ShareFailed(name, share, "odd")
            else:
                event = Answered(name, share, self.world.values(self.trials[share.trial], share))
            study = self._do(study, event, held, busy)
        return study

    def again(self) -> Study:
        """The study as it is found on the disk."""
        return Carrier.run(self, 1, steps=0)

    def _do(self, study: Study, event: Event, held: dict[str, tuple[str | None, int]], busy: dict[str, Share]) -> Study:
        events = [event]
        while events:
            study, actions = transition(study, events.pop(0))
            for action in actions:
                match action:
                    case Assign(name, share, fresh, at):
                        self._check(held[name], share, fresh, at)
                        assert name not in busy
                        self.switches += fresh
                        held[name] = None if share.trial == BASE else share.trial, share.step
                        busy[name] = share
                    case AppendCommit(trial, commit):
                        assert commit.step == len(self.ledgers[trial])
                        assert commit.previous == (self.ledgers[trial][-1].hash if commit.step else GENESIS)
                        self.ledgers[trial].append(commit)
                        events.append(CommitDurable(trial, commit.step))
                    case Note():
                        self.notes.append(action)
                        if action.evaluated is not None:
                            self.evaluations.setdefault(action.trial, []).append(action.evaluated)
                    case Finish():
                        pass
        return study

    def _check(self, held: tuple[str | None, int], share: Share, fresh: bool, at: int) -> None:
        """A replica can get to the weights it is to work on: from the base ones, or from those it has."""
        trial, step = held
        wanted = None if share.trial == BASE else share.trial
        assert (fresh and at == 0) or (trial == wanted and step == at)
        assert at <= share.step <= len(self.ledgers.get(share.trial, ()))
        assert share.parts
