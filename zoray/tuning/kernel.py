"""The kernel of a study: `transition(study, event) -> (study, actions)`, pure.

No decision looks at a clock, at a replica or at the order in which answers came: which trials are cut follows from
their evaluations alone, and those from their ledgers. A rung is decided when all its trials have come to its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from zoray.aggregate import ProbeResult
from zoray.commits import Commit
from zoray.errors import NumericsError, ZorayError
from zoray.tuning.evaluated import Evaluated
from zoray.tuning.grid import Plan, kept
from zoray.tuning.messages import (
    Action,
    Answered,
    AppendCommit,
    CommitDurable,
    Event,
    Finish,
    Note,
    ReplicaLost,
    ReplicaReady,
    ShareFailed,
    StopRequested,
)
from zoray.tuning.race import BASE, Phase, Race, Rules, Study, Worker, bad_evaluation, divergence
from zoray.tuning.sharing import assign


def begin(
    plan: Plan,
    rules: Rules,
    ledgers: Mapping[str, tuple[bytes, Sequence[Commit]]],
    evaluations: Mapping[str, Sequence[Evaluated]],
) -> Study:
    """A study at its beginning, or where it was left.

    Args:
        plan, rules: of the study.
        ledgers: of each trial, by name: hash of the ledger's header, and its commits.
        evaluations: those that were made before, by name, in the order of the rungs; what follows from them is decided
            again, and the same.
    """
    races = {BASE: Race(None, 0, b"", evaluations=tuple(evaluations.get(BASE, ())))}
    for trial in plan.trials:
        genesis, commits = ledgers[trial.name]
        race = Race(trial, 0, genesis, known=rules.initial, evaluations=tuple(evaluations.get(trial.name, ())))
        races[trial.name] = _advanced(race, rules, commits)
    study = Study(plan, rules, races)
    settle(study, [])
    return study


def _advanced(race: Race, rules: Rules, commits: Sequence[Commit]) -> Race:
    """A trial some commits further."""
    known = race.known
    for commit in commits:
        known = rules.after(known, commit)
    # A null commit has a loss of nan, which is what tells that the trial diverges.
    losses = tuple(commit.loss if commit.applied else math.nan for commit in commits)
    head = commits[-1].hash if commits else race.head
    return replace(race, step=race.step + len(commits), head=head, losses=race.losses + losses, known=known)


def transition(study: Study, event: Event) -> tuple[Study, tuple[Action, ...]]:
    """What becomes of a study after one event.

    Args:
        study: the state before, which is left as it was.
        event: what happened. Of replicas that are not known, or not any more, nothing is taken.

    Raises:
        ZorayError: the carrier said that a commit is durable which it was not given.
    """
    if study.finish is not None:
        return study, ()
    study, actions = study.copy(), list[Action]()
    match event:
        case ReplicaReady(name):
            study.workers.setdefault(name, Worker())
        case ReplicaLost(name):
            _lose(study, name)
        case Answered(name, share, values):
            worker = study.workers.get(name)
            if worker is None or worker.share != share:
                return study, ()
            study.workers[name] = replace(worker, share=None)
            race = study.races[share.trial]
            if race.phase is Phase.RUNNING:
                found = {**race.values, **dict(zip(share.parts, values, strict=True))}
                study.races[share.trial] = replace(race, values=found, failures=0)
        case ShareFailed(name, share, reason) if name in study.workers:
            _fail(study, name, share.trial, reason, actions)
        case CommitDurable(trial, step):
            _committed(study, trial, step)
        case StopRequested():
            _finish(study, Finish("stopped", "stopped"), actions)
    settle(study, actions)
    if study.finish is None:
        actions += assign(study)
    return study, tuple(actions)


def settle(study: Study, actions: list[Action]) -> None:
    """Decide whatever can be decided: steps, evaluations, rungs, the end. Changes `study`, the kernel's own copy."""
    moved = True
    while moved and study.finish is None:
        moved = False
        for race in study.running():
            moved = _advance(study, race, actions) or moved
        if study.base.evaluations and not study.base.evaluations[0].finite:
            _finish(study, Finish("diverged", "the model's loss is not finite before any step"), actions)
        elif study.base.evaluations and all(len(race.evaluations) > study.rung for race in study.running()):
            _end_rung(study, actions)
            moved = True


def _advance(study: Study, race: Race, actions: list[Action]) -> bool:
    """Bring one trial as far as it goes by itself; whether anything has changed that others may depend on."""
    if (race.trial is not None and len(race.evaluations) > study.rung) or race.pending is not None:
        return False
    rules, evaluating = study.rules, race.step >= race.target(study.plan)
    wanted = rules.eval_shards if evaluating else rules.probes(race.known)
    if len(race.values) < wanted:
        if race.values or race.open or _in_work(study, race):
            return False
        if race.trial is not None and (why := divergence(study, race)) is not None:
            _drop(study, race, why, actions)
            return True
        study.races[race.name] = replace(race, open=tuple(range(wanted)))
        return False
    if evaluating:
        _evaluate(study, race, actions)
        return True
    assert race.trial is not None
    results = [value for value in race.values.values() if isinstance(value, ProbeResult)]
    try:
        commit = rules.decide(race.trial, race.step, results, race.head, race.known).commit
    except NumericsError as error:
        _drop(study, race, error.what, actions)
        return True
    study.races[race.name] = replace(race, values={}, pending=commit)
    actions.append(AppendCommit(race.name, commit))
    return False


def _evaluate(study: Study, race: Race, actions: list[Action]) -> None:
    """Put the parts of an evaluation together."""
    parts = [part for _, part in sorted(race.values.items()) if isinstance(part, Evaluated)]
    found = Evaluated(tuple(loss for part in parts for loss in part.losses), sum(part.correct for part in parts))
    at, rung = min(race.step, race.target(study.plan)), -1 if race.trial is None else study.rung
    race = replace(race, values={}, evaluations=(*race.evaluations, found))
    study.races[race.name] = race
    actions.append(Note("evaluated", race.name, rung, at, found))


def _end_rung(study: Study, actions: list[Action]) -> None:
    """Keep the best trials of the rung, and cut the others."""
    for race in study.running():
        if (why := bad_evaluation(study, race.evaluations[study.rung])) is not None:
            _drop(study, race, why, actions)
    ranked = ranking(study)
    if _readmit(study, len(ranked), actions):
        return
    if not ranked:
        spared = any(race.phase is Phase.CUT for race in study.races.values())
        text = "all trials have diverged" if not spared else "all trials but those cut before have diverged"
        _finish(study, Finish("done" if spared else "diverged", text), actions)
        return
    if study.rung + 1 == len(study.plan.rungs):
        _finish(study, Finish("done", f"{ranked[0].name} is the best of the last rung"), actions)
        return
    count = kept(len(study.plan.trials), study.plan.eta, study.rung + 1)
    last = ranked[min(count, len(ranked)) - 1].evaluations[study.rung]
    for place, race in enumerate(ranked):
        mine = race.evaluations[study.rung]
        if place < count:
            actions.append(Note("kept", race.name, study.rung, study.plan.rungs[study.rung]))
            continue
        text = f"place {place + 1} of {len(ranked)}" + (
            "" if mine.told_from(last) else ", not told apart from the last kept"
        )
        study.races[race.name] = replace(race, phase=Phase.CUT, why=text, cut_in=study.rung)
        actions.append(Note("cut", race.name, study.rung, study.plan.rungs[study.rung], text=text))
    study.rung += 1


def _readmit(study: Study, left: int, actions: list[Action]) -> bool:
    """Put the best trials that were cut before this rung in the places of those that have diverged in it; whether any.

    What learns fastest at first is often what diverges later: it must not have the last rung to itself.
    """
    before = study.rung - 1
    cut = [race for race in study.races.values() if race.phase is Phase.CUT and race.cut_in == before]
    missing = max(0, kept(len(study.plan.trials), study.plan.eta, study.rung) - left)
    back = sorted(cut, key=lambda race: _order(race, before))[:missing]
    for race in back:
        study.races[race.name] = replace(race, phase=Phase.RUNNING, why="", cut_in=None)
        text = "in the place of one that diverges"
        actions.append(Note("kept", race.name, before, study.plan.rungs[before], text=text))
    return bool(back)


def ranking(study: Study) -> list[Race]:
    """The trials that are left at the end of the rung, best first; of equal ones that with the smaller rate."""
    left = [race for race in study.running() if len(race.evaluations) > study.rung]
    return sorted(left, key=lambda race: _order(race, study.rung))


def _order(race: Race, rung: int) -> tuple[float, float, float]:
    assert race.trial is not None
    return race.evaluations[rung].loss, race.trial.learning_rate, race.trial.epsilon


def _committed(study: Study, trial: str, step: int) -> None:
    race = study.races[trial]
    commit = race.pending
    if commit is None or commit.step != step:
        raise ZorayError(f"step {step} of {trial} is said to be durable, but it is not awaited")
    study.races[trial] = replace(_advanced(race, study.rules, [commit]), pending=None)


def _drop(study: Study, race: Race, why: str, actions: list[Action]) -> None:
    """Take a trial out that diverges; who works on it goes on, and is not listened to."""
    study.races[race.name] = replace(race, phase=Phase.DIVERGED, why=why, open=(), values={})
    actions.append(Note("diverged", race.name, study.rung, min(race.step, race.target(study.plan)), text=why))


def _lose(study: Study, name: str) -> None:
    worker = study.workers.pop(name, None)
    if worker is not None and worker.share is not None:
        race = study.races[worker.share.trial]
        if race.phase is Phase.RUNNING:
            study.races[race.name] = replace(race, open=tuple(sorted((*race.open, *worker.share.parts))))


def _fail(study: Study, name: str, trial: str, reason: str, actions: list[Action]) -> None:
    _lose(study, name)
    race = study.races[trial]
    study.races[trial] = replace(race, failures=race.failures + 1)
    if race.failures + 1 >= study.rules.attempts:
        _finish(study, Finish("failed", f"{trial} failed on {study.rules.attempts} replicas: {reason}"), actions)


def _in_work(study: Study, race: Race) -> bool:
    return any(worker.share is not None and worker.share.trial == race.name for worker in study.workers.values())


def _finish(study: Study, finish: Finish, actions: list[Action]) -> None:
    study.finish = finish
    actions.append(finish)
