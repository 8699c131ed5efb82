"""The kernel's decisions, one by one. `tests/simulation` puts them together."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import pytest

from zoray.aggregate import ProbeResult, aggregate
from zoray.errors import ConfigError
from zoray.protocol import (
    Action,
    Answer,
    AppendCommit,
    AppendFailed,
    Assign,
    CommitDurable,
    DigestValue,
    EvalSums,
    Event,
    Failed,
    Finish,
    Item,
    Kind,
    Phase,
    ProbeScalars,
    Refused,
    Release,
    RemoveReplica,
    ReplicaLost,
    ReplicaReady,
    Report,
    Rewind,
    Rewound,
    Settings,
    State,
    StopRequested,
    Tick,
    Warn,
    initial_state,
    transition,
)
from zoray.protocol.decide import evaluation

T = TypeVar("T", bound=Action)
GENESIS = bytes(32)


def settings(**changes: object) -> Settings:
    defaults: dict[str, object] = {"max_steps": 3, "directions": 2, "learning_rate": lambda step: 0.1}
    defaults |= {"prove_newcomers": False, "digest_share": 0.0, "short_probe": 0.0}
    return Settings(**{**defaults, **changes})  # type: ignore[arg-type]


class Driver:
    """A run of the kernel with a clock, answering as a perfect replica would."""

    def __init__(self, config: Settings, *, step: int = 0, skipped: int = 0) -> None:
        self.state: State = initial_state(config, step, GENESIS, skipped=skipped)
        self.now = 0.0
        self.log: list[Action] = []

    def feed(self, event: Event, now: float | None = None) -> tuple[Action, ...]:
        self.now = self.now if now is None else now
        self.state, actions = transition(self.state, event, self.now)
        self.log += actions
        return actions

    def join(self, *names: str, step: int = 0) -> list[Assign]:
        return [a for name in names for a in of(Assign, self.feed(ReplicaReady(name, step)))]

    def answer(self, assign: Assign, digest: int = 7, g: float = 1.0) -> tuple[Action, ...]:
        item = assign.item
        payloads = {
            Kind.PROBE: ProbeScalars(g + item.part, 2.0, 0.25, 0.5),
            Kind.EVAL: EvalSums(4.0, 9.0, 2, 1),
        }
        return self.feed(Answer(assign.replica, item, payloads.get(item.kind, DigestValue(digest))))

    def play(self, assigned: Iterable[Assign], **answer: float) -> list[Action]:
        """Answer everything, and confirm every commit, until nothing is left to do."""
        todo, seen = list(assigned), []
        while todo:
            actions = list(self.answer(todo.pop(0), **answer))  # type: ignore[arg-type]
            for commit in of(AppendCommit, actions):
                actions += self.feed(CommitDurable(commit.commit.step))
            todo += of(Assign, actions)
            seen += actions
        return seen


def of(kind: type[T], actions: Iterable[Action]) -> list[T]:
    return [action for action in actions if isinstance(action, kind)]


def probe(step: int, direction: int) -> Item:
    return Item(Kind.PROBE, step, direction)


def test_whole_run_on_one_replica() -> None:
    run = Driver(settings(max_steps=2, eval_steps=1, eval_shards=2, save_steps=1))
    actions = run.play(run.join("a"))
    commits, done = [c.commit for c in of(AppendCommit, run.log)], of(Finish, run.log)
    assert [c.step for c in commits] == [0, 1]
    assert commits[1].previous == commits[0].hash and commits[0].previous == GENESIS
    results = [ProbeResult(0, k, 0, 1.0 + k, 2.0) for k in range(2)]
    assert commits[0] == aggregate(0, results, directions=2, microbatches=1, learning_rate=0.1, previous=GENESIS).commit
    assert [r.record.evaluation.count for r in of(Report, actions)] == [4, 4, 4]
    assert [(f.reason, f.step, f.digest) for f in done] == [("done", 2, 7)]
    assert [a.item.step for a in of(Assign, actions) if a.item.kind is Kind.SNAPSHOT] == [1, 2]


def test_work_of_a_step_is_evaluation_snapshot_probes_and_at_the_end_digest() -> None:
    run = Driver(settings(max_steps=3, eval_shards=1, eval_steps=2, save_steps=2))
    kinds: dict[int, list[Kind]] = {}
    run.play(run.join("a"))
    for assign in of(Assign, run.log):
        kinds.setdefault(assign.item.step, []).append(assign.item.kind)
    assert kinds == {
        0: [Kind.EVAL, Kind.PROBE, Kind.PROBE],
        1: [Kind.PROBE, Kind.PROBE],
        2: [Kind.DIGEST, Kind.EVAL, Kind.SNAPSHOT, Kind.PROBE, Kind.PROBE],
        3: [Kind.DIGEST, Kind.EVAL],
    }


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"eval_steps": 2}, [0, 2, 4, 5]),
        ({"eval_steps": 2, "eval_on_start": False}, [2, 4, 5]),
        ({"eval_steps": None}, [0, 5]),
        ({"eval_steps": 2, "eval_shards": 0}, []),
    ],
)
def test_steps_that_are_evaluated(changes: dict[str, object], steps: list[int]) -> None:
    config = settings(**{"max_steps": 5, "eval_shards": 1, **changes})
    assert [step for step in range(6) if config.evaluates(step)] == steps


def test_no_replica_idles_while_an_item_is_unassigned() -> None:
    run = Driver(settings(directions=3))
    assert [a.item for a in run.join("a", "b")] == [probe(0, 0), probe(0, 1)]
    assert [a.item for a in of(Assign, run.answer(Assign("b", probe(0, 1), 0)))] == [probe(0, 2)]
    assert run.join("c") == []
    (again,) = of(Assign, run.feed(ReplicaLost("a", "killed")))
    assert (again.replica, again.item) == ("c", probe(0, 0))


def lined_up(seconds: float, **changes: object) -> tuple[Driver, list[Assign]]:
    """Two replicas in a step of eight probes, of which each has answered one after some seconds; what they got then.

    Where probes are short, "a" runs the third and has the fourth in line, "b" the fifth and the sixth.
    """
    run = Driver(settings(**{"directions": 8, "short_probe": 0.1, **changes}))
    first, second = run.join("a", "b")
    run.now += seconds
    return run, [*of(Assign, run.answer(first)), *of(Assign, run.answer(second))]


def parts(actions: Iterable[Action]) -> list[tuple[str, int]]:
    return [(a.replica, a.item.part) for a in of(Assign, actions)]


def test_short_probes_are_sent_before_the_last_answer_is_there() -> None:
    run, given = lined_up(0.05)
    assert parts(given) == [("a", 2), ("a", 3), ("b", 4), ("b", 5)]
    assert [a.commits_from for a in given] == [0, 0, 0, 0]
    # Two are left, for whoever is idle first.
    assert parts(run.answer(Assign("a", probe(0, 2), 0))) == []
    assert run.state.members["a"].item == probe(0, 3)
    assert parts(run.answer(Assign("a", probe(0, 3), 0))) == [("a", 6)]


def test_the_last_of_very_short_probes_are_sent_ahead_too() -> None:
    run, _ = lined_up(0.01)
    assert parts(run.answer(Assign("a", probe(0, 2), 0))) == [("a", 6)]
    assert run.state.members["a"].ahead == probe(0, 6)


def test_a_slow_replica_has_nothing_in_line_however_many_are_left() -> None:
    run = Driver(settings(directions=16, short_probe=0.1))
    first, slow = run.join("a", "b")
    run.now = 0.01
    # Of "b" nobody knows yet how long it takes.
    assert parts(run.answer(first)) == [("a", 2), ("a", 3)]
    run.now = 0.02
    assert parts(run.answer(Assign("a", probe(0, 2), 0))) == [("a", 4)]
    run.now = 0.1
    assert parts(run.answer(slow)) == [("b", 5)]


@pytest.mark.parametrize(("seconds", "changes"), [(0.1, {}), (0.0, {"short_probe": 0.0})])
def test_other_probes_are_given_to_idle_replicas_alone(seconds: float, changes: dict[str, object]) -> None:
    run, given = lined_up(seconds, **changes)
    assert parts(given) == [("a", 2), ("b", 3)]
    assert run.state.members["b"].ahead is None


def test_what_a_lost_replica_had_in_line_is_given_again_too() -> None:
    run, _ = lined_up(0.05)
    run.feed(ReplicaLost("b", "killed"))
    assert set(run.state.again) == {probe(0, 4), probe(0, 5)}
    run.play([Assign("a", probe(0, 2), 0), Assign("a", probe(0, 3), 0)])
    assert of(Finish, run.log)[0].reason == "done"


def test_a_replica_asked_to_leave_does_not_stay_for_what_it_has_in_line() -> None:
    run, _ = lined_up(0.05)
    run.feed(RemoveReplica("b"))
    assert run.state.again == (probe(0, 5),)
    (release,) = of(Release, run.answer(Assign("b", probe(0, 4), 0)))
    assert release.cause == "drained"


def test_what_is_in_line_is_late_only_when_its_turn_was_long_ago() -> None:
    run, _ = lined_up(0.05, late_minimum=10.0)
    run.now = 9.0
    run.answer(Assign("b", probe(0, 4), 0))
    assert run.state.members["b"].since == run.state.flights[probe(0, 5)].since == 9.0


def test_an_answer_out_of_turn_counts_and_the_first_is_still_awaited() -> None:
    run, _ = lined_up(0.05)
    run.answer(Assign("b", probe(0, 5), 0))
    member = run.state.members["b"]
    assert (member.item, member.ahead) == (probe(0, 4), None) and probe(0, 5) in run.state.results


def test_a_replica_that_lacks_commits_has_nothing_in_line_any_more() -> None:
    run, _ = lined_up(0.05)
    given = run.feed(Refused("b", probe(0, 4), 0, "restarted"))
    assert parts(given) == [("b", 4)] and run.state.again == (probe(0, 5),)


def test_a_probe_that_fails_does_not_take_along_what_is_in_line() -> None:
    run, _ = lined_up(0.05)
    run.feed(Failed("b", probe(0, 4), "out of memory"))
    assert run.state.members["b"].item == probe(0, 5)
    run.play([Assign("a", probe(0, 2), 0), Assign("a", probe(0, 3), 0), Assign("b", probe(0, 5), 0)])
    assert of(Finish, run.log)[0].reason == "done"


def test_no_snapshot_is_due_while_one_is_being_written() -> None:
    run = Driver(settings(max_steps=4, directions=2, save_steps=1))
    todo, written = run.join("a", "b"), []
    while run.state.step < 4:
        assign = todo.pop(0)
        if assign.item.kind is Kind.SNAPSHOT:
            written.append(assign)
            continue
        actions = list(run.answer(assign))
        for commit in of(AppendCommit, actions):
            actions += run.feed(CommitDurable(commit.commit.step))
        todo += of(Assign, actions)
    # The one at the end of the run is not left out.
    assert [a.item.step for a in written] == [1]
    assert Item(Kind.SNAPSHOT, 4) in run.state.work


def test_nothing_of_the_next_step_before_the_commit_is_durable() -> None:
    run = Driver(settings(directions=1))
    (assign,) = run.join("a")
    (append,) = run.answer(assign)
    assert isinstance(append, AppendCommit)
    assert run.join("b") == [] and run.feed(Tick(), now=1e6) == ()
    actions = run.feed(CommitDurable(0))
    assert [(a.item, a.commits_from) for a in of(Assign, actions)] == [(probe(1, 0), 0)]
    assert of(Warn, run.feed(CommitDurable(0))) and run.state.step == 1


def test_replicas_are_sent_only_the_commits_they_lack() -> None:
    run = Driver(settings(max_steps=9), step=5)
    assert [a.commits_from for a in run.join("a", step=3)] == [3]
    run.answer(Assign("a", probe(5, 0), 3))
    assert of(Assign, run.log)[-1].commits_from == 5
    assert [a.commits_from for a in of(Assign, run.feed(Refused("a", probe(5, 1), 0, "restarted")))] == [0]


def test_late_item_is_given_a_second_time_and_the_first_answer_counts() -> None:
    run = Driver(settings(directions=3, late_minimum=10.0))
    assigned = run.join("a", "b", "c")
    run.now = 1.0
    for assign in assigned[1:]:
        run.answer(assign)
    assert run.feed(Tick(), now=10.0) == ()
    (second,) = run.feed(Tick(), now=10.5)
    assert isinstance(second, Assign) and second.item == assigned[0].item and second.replica in "bc"
    (append,) = of(AppendCommit, run.answer(second, g=1.0))
    assert run.answer(assigned[0], g=99.0) == ()
    actions = run.feed(CommitDurable(0))
    assert {a.replica for a in of(Assign, actions)} == {"a", "b", "c"}
    assert append.commit.terms[0][2] == round(127 / 3)
    assert run.state.counters.late == 1


def test_deadline_follows_the_median() -> None:
    run = Driver(settings(directions=4, late_factor=4.0, late_minimum=0.1))
    (held,) = run.join("a")
    todo = run.join("b")
    while todo:
        run.now += 5.0
        todo = of(Assign, run.answer(todo[0]))
    assert run.now == 15.0 and run.feed(Tick(), now=20.0) == ()
    assert [a.item for a in of(Assign, run.feed(Tick(), now=20.1))] == [held.item]
    assert run.state.counters.late == 1


def test_an_upload_may_take_longer_than_others_took() -> None:
    """Its replica is not taken for silent while the patience lasts; a probe's is."""
    for patience, released in ((0.0, True), (1000.0, False)):
        run = Driver(
            settings(directions=1, save_steps=1, max_misses=1, first_deadline=10.0, snapshot_patience=patience)
        )
        (probe,) = run.join("a")
        run.answer(probe)
        (comparing,) = of(Assign, run.feed(CommitDurable(0)))
        actions = run.answer(comparing)
        assert [each.item.kind for each in of(Assign, actions)] == [Kind.SNAPSHOT]
        assert bool(of(Release, run.feed(Tick(), now=run.now + 100.0))) is released


def test_answers_of_earlier_steps_and_duplicates_are_ignored() -> None:
    run = Driver(settings(directions=2))
    (first,) = run.join("a")
    second = of(Assign, run.answer(first))
    run.answer(first, g=50.0)
    assert run.state.missing == 1 and run.state.counters.duplicates == 1
    run.play(second)
    assert run.state.phase is Phase.FINISHED
    commits = [c.commit for c in of(AppendCommit, run.log)]
    assert len({c.terms[0][2] for c in commits}) == 1
    late = Driver(settings())
    late.state = replace(late.state, step=1)
    late.join("a", step=1)
    late.answer(Assign("a", probe(0, 0), 0))
    assert late.state.counters.stale == 1 and late.state.results == {}


def test_replica_that_is_ready_again_is_idle_and_its_item_is_given_again() -> None:
    run = Driver(settings())
    (before,) = run.join("a")
    (after,) = run.join("a")
    assert {before.item, after.item} <= {probe(0, 0), probe(0, 1)}
    assert of(Assign, run.answer(after)) and len(run.state.members) == 1


def test_silent_replica_is_asked_again_then_released() -> None:
    run = Driver(settings(directions=1, first_deadline=1.0, max_misses=3))
    (asked,) = run.join("a")
    times = {}
    for now in range(1, 40):
        for action in run.feed(Tick(), now=float(now)):
            times[now] = type(action).__name__
            assert not isinstance(action, Assign) or action.item == asked.item
    # Twice the deadline, then twice as long each time.
    assert list(times.items()) == [(3, "Assign"), (8, "Assign"), (17, "Warn")]
    assert of(Release, run.log)[0].cause == "silent" and not run.state.members


def test_replica_asked_to_leave_finishes_its_item_first() -> None:
    run = Driver(settings())
    (assign,) = run.join("a")
    assert run.feed(RemoveReplica("a")) == ()
    (release,) = run.answer(assign)
    assert isinstance(release, Release) and release.cause == "drained"
    assert run.state.missing == 1
    run.join("b", "c")
    (release,) = run.feed(RemoveReplica("c"))
    assert isinstance(release, Release)
    assert of(Warn, run.feed(RemoveReplica("nobody")))


def test_failing_replica_is_released_and_the_run_goes_on() -> None:
    run = Driver(settings(directions=8, max_misses=4))
    run.join("bad", "good")
    for _ in range(4):
        item = run.state.members["bad"].item
        assert item is not None
        actions = run.feed(Failed("bad", item, "CUDA error"))
    assert [r.cause for r in of(Release, actions)] == ["failing"]
    assert not of(Finish, run.log)
    run.play([Assign("good", run.state.members["good"].item or probe(0, 0), 0)])
    assert of(Finish, run.log)[0].reason == "done"


def test_item_that_fails_everywhere_ends_the_run() -> None:
    run = Driver(settings(directions=1))
    (assign,) = run.join("a")
    for _ in range(3):
        actions = run.feed(Failed("a", assign.item, "out of memory"))
    (finish,) = of(Finish, actions)
    assert finish.reason == "failed" and "out of memory" in finish.text


def test_failed_snapshot_is_left_out() -> None:
    run = Driver(settings(max_steps=2, save_steps=2, directions=1), step=2)
    run.play(run.join("a", step=2)[:1])
    other = Driver(settings(max_steps=2, save_steps=2, directions=1), step=2)
    (digest,) = other.join("a", step=2)
    (snapshot,) = of(Assign, other.answer(digest))
    assert snapshot.item.kind is Kind.SNAPSHOT
    actions = other.feed(Failed("a", snapshot.item, "disk full"))
    assert of(Finish, actions)[0].reason == "done" and "disk full" in of(Warn, actions)[0].text


def test_replica_ahead_of_the_run_or_talking_nonsense_is_released() -> None:
    run = Driver(settings())
    (release,) = run.feed(ReplicaReady("a", 1))
    assert isinstance(release, Release) and release.cause == "violation"
    (assign,) = run.join("b")
    (release, _) = run.feed(Answer("b", assign.item, DigestValue(1)))
    assert isinstance(release, Release) and release.cause == "violation"
    run.join("c")
    (release, _) = run.feed(Answer("c", probe(4, 0), ProbeScalars(1.0, 1.0, 0.0, 0.0)))
    assert isinstance(release, Release) and run.state.counters.violations == 3


def test_digests_that_agree_end_the_run_and_a_minority_is_released() -> None:
    run = Driver(settings(max_steps=1), step=1)
    assigned = run.join("a", "b", "c", step=1)
    assert [a.item for a in assigned] == [Item(Kind.DIGEST, 1)] * 3
    for assign, digest in zip(assigned, (5, 6, 5), strict=True):
        actions = run.answer(assign, digest=digest)
    assert [r.replica for r in of(Release, actions)] == ["b"]
    assert of(Finish, actions)[0].digest == 5 and run.state.counters.diverged == 1


def test_replicas_without_a_majority_are_all_released_and_too_many_times_end_the_run() -> None:
    run = Driver(settings(max_steps=1, max_rewinds=2), step=1)
    for attempt in range(3):
        assert not of(Finish, run.log)
        for assign, digest in zip(run.join(f"a{attempt}", f"b{attempt}", step=1), (5, 6), strict=True):
            actions = run.answer(assign, digest=digest)
        assert len(of(Release, actions)) == 2 and not run.state.members
    (finish,) = of(Finish, actions)
    assert finish.reason == "numerics" and "3 times in a row" in finish.text and "zoray verify" in str(finish.advice)


def play_until(run: Driver, step: int, assigned: Iterable[Assign]) -> list[Assign]:
    """Let all replicas work until the run is at `step`; what is unanswered then."""
    todo = list(assigned)
    while run.state.step < step:
        actions = list(run.answer(todo.pop(0)))
        actions += [a for c in of(AppendCommit, actions) for a in run.feed(CommitDurable(c.commit.step))]
        todo += of(Assign, actions)
    return todo


def test_commits_made_with_a_diverged_replica_are_computed_again() -> None:
    run = Driver(settings(max_steps=20, directions=6, digest_every=4))
    todo = play_until(run, 4, run.join("a", "b", "c"))
    for assign in todo:
        run.answer(assign, digest=5)
    digests = [a for a in play_until(run, 8, of(Assign, run.log)[-3:]) if a.item == Item(Kind.DIGEST, 8)]
    assert {a.replica for a in digests} == {"a", "b", "c"}
    probes = [of(Assign, run.answer(a, digest=6 if a.replica == "b" else 5))[0] for a in digests]
    while not of(Rewind, run.log):
        assign = probes.pop(0)
        probes += of(Assign, run.answer(assign))
    (rewind,) = of(Rewind, run.log)
    assert rewind.step == 4 and not run.state.members and run.state.phase is Phase.REWINDING
    assert [r.cause for r in of(Release, run.log)] == ["diverged", "rewound", "rewound"]
    (refused,) = run.feed(ReplicaReady("late", 7))
    assert isinstance(refused, Release) and refused.cause == "rewound"
    run.feed(Rewound(4, GENESIS, 0))
    assert (run.state.step, run.state.phase, run.state.counters.rewinds) == (4, Phase.PROBING, 1)
    assert [a.item.step for a in run.join("d", step=2)] == [4]


def test_newcomer_gives_its_digest_before_it_takes_probes() -> None:
    run = Driver(settings(directions=8, prove_newcomers=True))
    assert [a.item.kind for a in run.join("a")] == [Kind.PROBE]
    (digest,) = run.join("b")
    assert digest.item == Item(Kind.DIGEST, 0)
    (witness,) = of(Assign, run.answer(Assign("a", probe(0, 0), 0)))
    assert witness.item == Item(Kind.DIGEST, 0)
    todo = [*of(Assign, run.answer(digest)), *of(Assign, run.answer(witness))]
    run.play(todo)
    assert all(member.proven for member in run.state.members.values()) and of(Finish, run.log)[0].reason == "done"
    assert sum(a.item.kind is Kind.DIGEST and a.item.step < 3 for a in of(Assign, run.log)) == 2


def test_a_slow_newcomer_proves_itself_by_a_digest_that_comes_late() -> None:
    run = Driver(settings(max_steps=9, directions=4, prove_newcomers=True))
    todo = play_until(run, 1, run.join("a", "b"))
    (slow,) = run.join("slow", step=1)
    todo = play_until(run, 3, todo)
    asked = [a for a in of(Assign, run.log) if a.item.kind is Kind.DIGEST and a.replica == "slow"]
    assert asked == [slow] and not run.state.members["slow"].proven
    assert all(a.item.step <= 1 for a in of(Assign, run.log) if a.item.kind is Kind.DIGEST)
    (next_item,) = of(Assign, run.answer(slow))
    assert run.state.members["slow"].proven and next_item.item.kind is Kind.PROBE
    wrong = Driver(settings(max_steps=9, directions=4, prove_newcomers=True))
    todo = play_until(wrong, 1, wrong.join("a", "b"))
    (slow,) = wrong.join("slow", step=1)
    play_until(wrong, 3, todo)
    wrong.answer(slow, digest=8)
    assert [r.replica for r in of(Release, wrong.log)] == ["slow"] and wrong.state.phase is Phase.PROBING


def test_all_are_heard_before_anybody_is_sent_away() -> None:
    run = Driver(settings(max_steps=9, directions=3, prove_newcomers=True, digest_every=5), step=4)
    digest = [a for a in run.join("a", "b", "c", step=4) if a.item.kind is Kind.DIGEST]
    probes = [a for a in of(Assign, run.log) if a.item.kind is Kind.PROBE]
    todo = [*of(Assign, run.answer(digest[0], digest=6)), *probes]
    for assign in todo:
        run.answer(assign)
    assert not of(Release, run.log) and run.state.step == 4


def test_two_witnesses_are_asked_for_a_newcomer() -> None:
    run = Driver(settings(max_steps=50, directions=40, prove_newcomers=True))
    todo = play_until(run, 1, run.join(*"abcde"))
    assert all(member.proven for member in run.state.members.values())
    (digest,) = run.join("new", step=1)
    todo += [digest]
    for _ in range(30):
        todo += of(Assign, run.answer(todo.pop(0)))
    asked = [a.replica for a in of(Assign, run.log) if a.item == Item(Kind.DIGEST, 1)]
    assert len(asked) == 3 and "new" in asked


def test_digests_are_compared_as_often_as_they_cost_one_percent() -> None:
    run = Driver(settings(max_steps=400, directions=2, prove_newcomers=True, digest_share=0.01))
    todo = run.join("a", "b")
    while run.state.step < 400:
        assign = todo.pop(0)
        run.now += 0.5
        actions = list(run.answer(assign))
        actions += [a for c in of(AppendCommit, actions) for a in run.feed(CommitDurable(c.commit.step))]
        todo += of(Assign, actions)
    digests = sum(a.item.kind is Kind.DIGEST for a in of(Assign, run.log))
    seconds = run.state.durations[Kind.DIGEST]
    assert digests >= 4 and digests / 2 * max(seconds) <= 0.02 * run.now + 2 * max(seconds)


def test_snapshot_is_due_when_replay_would_take_longer_than_asked() -> None:
    run = Driver(settings(max_steps=50, directions=2, snapshot_after=5.0))
    run.play(run.join("a"))
    steps = [a.item.step for a in of(Assign, run.log) if a.item.kind is Kind.SNAPSHOT]
    # A step's probes say 0.25 s of applying each, 0.5 s in all.
    assert steps == [10, 20, 30, 40, 50]


def test_what_a_divergent_replica_gave_is_computed_again() -> None:
    run = Driver(settings(max_steps=9, directions=3, digest_every=2), step=2)
    digests = run.join("a", "b", "c", step=2)
    assert {a.item.kind for a in digests} == {Kind.DIGEST}
    probes = [of(Assign, run.answer(a, digest=6 if a.replica == "b" else 5))[0] for a in digests]
    for assign in probes:
        actions = run.answer(assign)
    assert not of(AppendCommit, actions) and [r.replica for r in of(Release, actions)] == ["b"]
    (again,) = of(Assign, actions)
    assert again.item == probes[1].item and again.replica != "b"
    assert of(AppendCommit, run.answer(again))


def test_stop_ends_at_the_last_commit_with_digests() -> None:
    run = Driver(settings())
    run.join("a")
    assert run.feed(StopRequested()) == ()
    (digest,) = of(Assign, run.answer(Assign("a", probe(0, 0), 0)))
    assert digest.item == Item(Kind.DIGEST, 0)
    (finish,) = run.answer(digest)
    assert isinstance(finish, Finish) and (finish.reason, finish.step) == ("stopped", 0)
    assert run.feed(ReplicaReady("b", 0)) == ()


def test_stop_while_the_commit_is_written_keeps_it() -> None:
    run = Driver(settings(directions=1))
    run.answer(run.join("a")[0])
    assert run.feed(StopRequested()) == ()
    (digest,) = of(Assign, run.feed(CommitDurable(0)))
    assert digest.item == Item(Kind.DIGEST, 1)


def test_stop_without_replicas_and_stop_asked_twice_end_at_once() -> None:
    assert isinstance(Driver(settings()).feed(StopRequested())[0], Finish)
    run = Driver(settings())
    run.join("a")
    run.feed(StopRequested())
    assert of(Finish, run.feed(StopRequested()))[0].reason == "stopped"


def test_run_that_is_complete_is_only_evaluated_and_compared() -> None:
    run = Driver(settings(eval_shards=2, eval_on_start=False), step=3)
    actions = run.play(run.join("a", step=3))
    assert not of(AppendCommit, actions)
    (report,) = of(Report, actions)
    assert report.record.aggregate is None and report.record.evaluation and report.record.evaluation.count == 4
    assert of(Finish, actions)[0].reason == "done"


def test_run_without_finite_losses_gives_up_with_advice() -> None:
    run = Driver(settings(max_steps=99, max_skipped_steps=3))
    run.play(run.join("a"), g=math.nan)
    (finish,) = of(Finish, run.log)
    assert finish.reason == "numerics" and "from the first step on" in finish.text
    assert len(of(AppendCommit, run.log)) == 3 and not any(c.commit.applied for c in of(AppendCommit, run.log))
    later = Driver(settings(max_steps=99, max_skipped_steps=3), step=10, skipped=2)
    later.play(later.join("a", step=10), g=math.inf)
    (finish,) = of(Finish, later.log)
    assert (finish.step, "from step 8 on" in finish.text, "learning_rate" in str(finish.advice)) == (11, True, True)


def test_resume_of_a_run_that_gave_up_gives_up() -> None:
    run = Driver(settings(max_skipped_steps=2), step=2, skipped=2)
    assert of(Finish, run.feed(Tick()))[0].reason == "numerics"


def test_update_too_large_for_float32_ends_the_run() -> None:
    run = Driver(settings(learning_rate=lambda step: 1e42))
    run.play(run.join("a"))
    assert of(Finish, run.log)[0].reason == "numerics" and "lower it" in str(of(Finish, run.log)[0].advice)


def test_commit_that_cannot_be_written_ends_the_run() -> None:
    run = Driver(settings(directions=1))
    run.answer(run.join("a")[0])
    (finish,) = run.feed(AppendFailed(0, "no space left on device"))
    assert isinstance(finish, Finish) and (finish.reason, finish.step) == ("storage", 0)


def test_step_record_adds_up_the_seconds() -> None:
    run = Driver(settings(max_steps=1, directions=4))
    run.play(run.join("a"))
    record = of(Report, run.log)[0].record
    assert (record.probe_seconds, record.apply_seconds, record.replicas, record.learning_rate) == (2.0, 1.0, 1, 0.1)


def test_evaluation_is_the_mean_with_its_standard_error() -> None:
    losses = [1.0, 2.0, 4.0, 7.0]
    shards = [EvalSums(sum(part), sum(x * x for x in part), 2, 1) for part in (losses[:2], losses[2:])]
    found = evaluation(shards)
    variance = sum((x - 3.5) ** 2 for x in losses) / 3
    assert (found.loss, found.count, found.correct) == (3.5, 4, 2)
    assert found.standard_error == pytest.approx(math.sqrt(variance / 4))
    assert math.isnan(evaluation([EvalSums(0.0, 0.0, 0, 0)]).loss)


@pytest.mark.parametrize(
    "changes", [{"directions": 0}, {"microbatches": 2**16}, {"eval_steps": 0}, {"max_skipped_steps": 0}]
)
def test_counts_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        settings(**changes)


def calls_for_one_answer(replicas: int) -> int:
    """Python calls made for the answer of one replica among many, in the middle of a step."""
    run = Driver(settings(directions=2 * replicas))
    assigned = run.join(*(f"r{i}" for i in range(replicas)))
    count = 0

    def profile(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    event = Answer("r0", assigned[0].item, ProbeScalars(1.0, 1.0, 0.0, 0.0))
    sys.setprofile(profile)
    try:
        transition(run.state, event, 1.0)
    finally:
        sys.setprofile(None)
    return count


def test_work_for_an_answer_does_not_grow_with_the_replicas() -> None:
    assert calls_for_one_answer(256) == calls_for_one_answer(4)


def test_transition_leaves_the_state_alone() -> None:
    run = Driver(settings())
    run.join("a")
    before, members = run.state, dict(run.state.members)
    transition(before, ReplicaLost("a", "killed"), 1.0)
    assert before.members == members and before.cursor == 1


def test_kernel_imports_neither_torch_nor_ray_nor_a_clock() -> None:
    code = (
        "import sys; before = set(sys.modules); import zoray.protocol.kernel as k, zoray.protocol as p;"
        "names = {m for m in ('torch', 'ray', 'transformers', 'numpy') if m in sys.modules};"
        "clock = [m for m in sys.modules if m.startswith('zoray.protocol') and hasattr(sys.modules[m], 'time')];"
        "assert not names and not clock, (names, clock)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
