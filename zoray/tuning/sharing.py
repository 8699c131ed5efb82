"""Who works on what: replicas are shared between the trials, and a trial's step between replicas.

A replica stays with the trial whose weights it has; going to another one costs it a replay. As long as there are more
trials than replicas each works on a trial of its own, and nobody waits for anybody. Those that are left over when few
trials remain help with the steps of these.
"""

from __future__ import annotations

from dataclasses import replace

from zoray.tuning.messages import Assign, Share
from zoray.tuning.race import BASE, Race, Study, Worker


def assign(study: Study) -> list[Assign]:
    """Give the replicas that are idle what there is to do; changes `study`, which is the kernel's own copy."""
    races = {race.name: race for race in study.running()}
    chosen = _choose(study, races)
    given = []
    for name, trial in chosen.items():
        race, worker = study.races[trial], study.workers[name]
        others = sum(other == trial for other in chosen.values()) - 1
        busy = sum(_works_on(each, trial) for each in study.workers.values())
        count = _portion(len(race.open), others + busy)
        if count == 0:
            continue
        share = Share(trial, *_what(study, race), race.open[:count])
        wanted = None if trial == BASE else trial
        fresh = worker.trial != wanted or worker.step > share.step
        given.append(Assign(name, share, fresh, 0 if fresh else worker.step))
        study.workers[name] = Worker(wanted, share.step, share)
        study.races[trial] = replace(race, open=race.open[count:])
        # The next one shares what is left with those that are yet to be given something.
        chosen = {other: at for other, at in chosen.items() if other != name}
    return given


def _choose(study: Study, races: dict[str, Race]) -> dict[str, str]:
    """A trial for each idle replica, as far as there is one."""
    idle = [name for name, worker in study.workers.items() if worker.share is None]
    chosen: dict[str, str] = {}
    for name in idle:
        held = study.workers[name].trial or BASE
        if held in races and races[held].open:
            chosen[name] = held
    for name in idle:
        if name not in chosen and (trial := _other(study, races, name, chosen)) is not None:
            chosen[name] = trial
    return chosen


def _other(study: Study, races: dict[str, Race], name: str, chosen: dict[str, str]) -> str | None:
    """A trial to go over to: one that nobody works on, else, for one that has none of its own, the one with fewest."""

    def crew(trial: str) -> int:
        return sum(_works_on(worker, trial) for worker in study.workers.values()) + list(chosen.values()).count(trial)

    own = races.get(study.workers[name].trial or BASE)
    if own is not None and own.pending is not None:
        # Its next step begins as soon as the commit is on the disk.
        return None
    free = [race for race in races.values() if len(race.open) > list(chosen.values()).count(race.name)]
    crews = {race.name: crew(race.name) for race in free}
    alone = [trial for trial, count in crews.items() if count == 0]
    if alone:
        # The longest way first: what is begun last should be short.
        return max(alone, key=lambda trial: races[trial].target(study.plan) - races[trial].step)
    waits = own is not None and len(own.evaluations) <= study.rung
    return None if waits or not crews else min(crews, key=lambda trial: crews[trial])


def _works_on(worker: Worker, trial: str) -> bool:
    return worker.share is not None and worker.share.trial == trial


def _portion(parts: int, others: int) -> int:
    """How many parts to take: all, or, beside others, half of one's even share (guided self-scheduling).

    Polychronopoulos and Kuck 1987: the last ones are small, so that a slow replica does not keep the others waiting.
    """
    return parts if not others else -(-parts // (2 * (others + 1)))


def _what(study: Study, race: Race) -> tuple[int, bool]:
    """Step of the weights, and whether they are to be evaluated."""
    target = race.target(study.plan)
    return min(race.step, target), race.step >= target
