"""Seeded schedules of a study: the number of replicas, their deaths and interruptions change nothing of the result."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.simulation.tuning import Carrier, World
from zoray.aggregate import ProbeResult
from zoray.tuning import Evaluated, Phase, Plan, Share, Trial, grid, make_plan, stand

PLAN = make_plan(grid(1e-4, 1e-3, None, None), 9, 3, 2)


def outcome(carrier: Carrier) -> object:
    return (
        carrier.ledgers,
        carrier.evaluations,
        sorted((n.kind, n.trial, n.rung, n.step, n.text) for n in carrier.notes),
    )


@pytest.fixture(scope="module")
def undisturbed() -> Carrier:
    carrier = Carrier(PLAN, World(wild=5e-4))
    assert carrier.run(1).finish is not None
    return carrier


@given(st.integers(1, 9), st.integers(0, 2**32), st.sampled_from([0.0, 0.05, 0.3]))
def test_replicas_and_their_deaths_change_nothing(
    undisturbed: Carrier, replicas: int, seed: int, deaths: float
) -> None:
    carrier = Carrier(PLAN, World(wild=5e-4))
    study = carrier.run(replicas, seed, deaths)
    if study.finish is not None and study.finish.reason == "failed":
        # Three deaths over the same trial in a row are the study's end by design; the rest is a beginning of the whole.
        assert deaths and all(
            carrier.ledgers[n] == undisturbed.ledgers[n][: len(c)] for n, c in carrier.ledgers.items()
        )
        return
    assert study.finish is not None and study.finish.reason == "done"
    assert outcome(carrier) == outcome(undisturbed)


@given(st.integers(1, 4), st.integers(0, 2**32), st.lists(st.integers(1, 40), max_size=6))
def test_interruptions_change_nothing(undisturbed: Carrier, replicas: int, seed: int, cuts: list[int]) -> None:
    carrier = Carrier(PLAN, World(wild=5e-4))
    for i, events in enumerate(cuts):
        carrier.run(1 + (replicas + i) % 4, seed + i, steps=events)
    study = carrier.run(replicas, seed)
    assert study.finish is not None and study.finish.reason == "done"
    assert (carrier.ledgers, carrier.evaluations) == (undisturbed.ledgers, undisturbed.evaluations)
    assert [race.name for race in stand(study).races] == [race.name for race in stand(Carrier.again(undisturbed)).races]


def test_what_comes_of_it(undisturbed: Carrier) -> None:
    standing = stand(Carrier.again(undisturbed))
    assert standing.trial is not None and standing.trial.learning_rate == 1e-4
    assert standing.improves
    wild = [race for race in standing.races if race.trial is not None and race.trial.learning_rate > 5e-4]
    assert wild and all(race.phase is Phase.DIVERGED for race in wild)
    assert all("at step 2" in race.why or "no finite loss in step 1" in race.why for race in wild)
    # At once: the second step is the first with a bad loss, and none comes after it.
    assert {len(undisturbed.ledgers[race.name]) for race in wild} == {2}
    kept = [note.trial for note in undisturbed.notes if note.kind == "kept" and note.rung == 0]
    assert len(kept) == PLAN.entering(1)


def test_each_replica_stays_with_its_trial() -> None:
    """One replica goes through each rung trial by trial: as many replays as trials, not as steps."""
    carrier = Carrier(PLAN)
    carrier.run(1)
    assert carrier.switches <= sum(PLAN.entering(rung) for rung in range(3))
    many = Carrier(PLAN)
    many.run(3, seed=1)
    assert many.switches <= 2 * sum(PLAN.entering(rung) for rung in range(3))


def test_replicas_help_where_few_trials_are_left() -> None:
    plan = make_plan((Trial(1e-4, 1e-3), Trial(1e-5, 1e-3)), 6, 1, 3)
    alone, helped = (_shares(Carrier(plan), replicas) for replicas in (2, 4))
    assert 2 * 6 <= alone < helped


def _shares(carrier: Carrier, replicas: int) -> int:
    """In how many shares the probes of all steps were done: more than steps only if replicas help each other."""
    shares: list[Share] = []

    class Noted(World):
        def values(self, trial: Trial | None, share: Share) -> tuple[ProbeResult | Evaluated, ...]:
            shares.append(share)
            return super().values(trial, share)

    carrier.world = Noted()
    assert carrier.run(replicas).finish is not None
    return sum(not share.evaluating for share in shares)


def test_all_wild_is_told() -> None:
    study = Carrier(PLAN, World(wild=0.0)).run(2)
    assert study.finish is not None and study.finish.reason == "diverged"
    assert stand(study).winner is None


def test_a_share_that_always_fails_ends_the_study() -> None:
    study = Carrier(PLAN).run(2, seed=3, deaths=1.0)
    assert study.finish is None or study.finish.reason == "failed"


def test_a_trial_that_a_person_has_continued_is_used(undisturbed: Carrier) -> None:
    """`zoray resume` may have taken a trial beyond its rung: it is evaluated where the others are."""
    carrier = Carrier(PLAN, World(wild=5e-4))
    name = stand(Carrier.again(undisturbed)).races[0].name
    carrier.ledgers[name] = list(undisturbed.ledgers[name])
    assert carrier.run(2).finish is not None
    assert outcome(carrier) == outcome(undisturbed)


def test_noise_is_said() -> None:
    plan: Plan = make_plan((Trial(1e-4, 1e-3), Trial(1e-4, 1.0001e-3), Trial(1e-6, 1e-3)), 3, 1, 3)
    standing = stand(Carrier(plan).run(1))
    assert [race.name for race in standing.undecided] == [
        race.name for race in standing.races[1:] if race.trial is not None and race.trial.learning_rate == 1e-4
    ]
