"""Where the trials of a study stand, which is the best, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass

from zoray.tuning.evaluated import Evaluated
from zoray.tuning.grid import Trial
from zoray.tuning.race import Phase, Race, Study


@dataclass(frozen=True, slots=True)
class Standing:
    """What came of a study.

    Attributes:
        races: the trials: the winner, then those that came furthest, of these the lower loss first; diverged ones last.
        winner: the best of those that are better than the model as it is and came furthest, or of those that came
            furthest where none is better; None if all have diverged, or none was evaluated.
        undecided: others of the same rung that its held-out loss does not tell from the winner's.
        improves: whether the winner's loss is below that of the model as it is, by more than chance.
        edges: names of the keys whose best value is the smallest or the largest that was tried.
    """

    races: tuple[Race, ...]
    winner: Race | None
    undecided: tuple[Race, ...]
    improves: bool
    edges: tuple[str, ...]

    @property
    def trial(self) -> Trial | None:
        """The winner's."""
        return None if self.winner is None else self.winner.trial


def stand(study: Study) -> Standing:
    """The standing of a study, at its end or on the way."""
    trials = sorted((race for race in study.races.values() if race.trial is not None), key=_key)
    judged = [race for race in trials if race.phase is not Phase.DIVERGED and race.evaluations]
    if not judged:
        return Standing(tuple(trials), None, (), False, ())
    start = study.base.evaluations[0]
    better = [race for race in judged if _improves(race.evaluations[-1], start)]
    # One that came to an earlier rung only, and has learnt, before one that came further and has not.
    best = (better or judged)[0]
    mine, level = best.evaluations[-1], len(best.evaluations)
    rivals = [race for race in judged if race is not best and len(race.evaluations) == level]
    undecided = tuple(race for race in rivals if not race.evaluations[-1].told_from(mine))
    races = (best, *(race for race in trials if race is not best))
    return Standing(races, best, undecided, bool(better), _edges(study, best))


def _improves(evaluated: Evaluated, start: Evaluated) -> bool:
    return evaluated.loss < start.loss and evaluated.told_from(start)


def _key(race: Race) -> tuple[bool, int, float, float, float]:
    assert race.trial is not None
    loss = race.evaluations[-1].loss if race.evaluations else 0.0
    # What is not a number has no place in an order.
    loss = loss if loss == loss else float("inf")
    return (
        race.phase is Phase.DIVERGED,
        -len(race.evaluations),
        loss,
        race.trial.learning_rate,
        race.trial.epsilon,
    )


def _edges(study: Study, winner: Race) -> tuple[str, ...]:
    assert winner.trial is not None
    found = []
    for key in ("learning_rate", "epsilon"):
        tried = {getattr(trial, key) for trial in study.plan.trials}
        # Of two values each is at an edge, which says nothing of a key that hardly matters.
        if len(tried) > 2 and getattr(winner.trial, key) in (min(tried), max(tried)):
            found.append(key)
    return tuple(found)
