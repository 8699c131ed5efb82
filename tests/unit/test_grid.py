"""Directions × microbatches × signs as assignments: replicas of several processes, probes whose signs are split."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_protocol import Driver, of, probe, settings
from zoray.aggregate import MeanLoss, ProbeResult, aggregate
from zoray.optim import Optimizer, Width
from zoray.protocol import (
    Action,
    Answer,
    AppendCommit,
    Assign,
    CommitDurable,
    DigestValue,
    EvalSums,
    Failed,
    Finish,
    Item,
    Kind,
    ProbeScalars,
    Refused,
    Release,
    ReplicaLost,
    ReplicaReady,
    Report,
    SideLoss,
    Tick,
)


def join(run: Driver, name: str, width: int) -> list[Assign]:
    return of(Assign, run.feed(ReplicaReady(name, 0, width)))


def everything(assign: Assign) -> tuple[Item, ...]:
    return assign.item, *assign.beside


def bundles(actions: Iterable[Action]) -> list[tuple[str, list[int]]]:
    return [(a.replica, [item.part for item in everything(a)]) for a in of(Assign, actions)]


def losses(item: Item) -> tuple[float, float]:
    """The losses on both sides of a probe's direction: a function of its address."""
    base = 2.0 + 0.1 * item.microbatch
    return base + 0.01 * (item.part + 1), base - 0.02 * item.part


def centre(item: Item) -> float:
    """The loss at the weights themselves, on the batch that begins with that direction."""
    return 1.7 + 0.1 * item.microbatch - 0.003 * item.part


def told(loss: float) -> MeanLoss:
    """A loss with a contrast, another for every loss."""
    return MeanLoss(loss, loss * loss - 3)


def side(loss: float) -> SideLoss:
    return SideLoss(loss, 0.0, 0.0, told(loss).contrast)


def answer(run: Driver, name: str, item: Item) -> tuple[Action, ...]:
    plus, minus = losses(item)
    match item.kind:
        case Kind.CENTRE:
            return run.feed(Answer(name, item, side(centre(item))))
        case Kind.PROBE:
            both = ProbeResult.of_losses(item.step, item.part, item.microbatch, told(plus), told(minus), 1e-3)
            scalars = ProbeScalars(both.projected_gradient, both.loss, 0.0, 0.0, both.contrast)
            return run.feed(Answer(name, item, scalars))
        case Kind.PLUS | Kind.MINUS:
            return run.feed(Answer(name, item, side(plus if item.kind is Kind.PLUS else minus)))
        case Kind.EVAL:
            return run.feed(Answer(name, item, EvalSums(4.0, 9.0, 2, 1)))
    return run.feed(Answer(name, item, DigestValue(7)))


def play(run: Driver, assigned: list[Assign]) -> Driver:
    """Answer everything until nothing is left to do."""
    todo = [(a.replica, item) for a in assigned for item in everything(a)]
    while todo:
        actions = list(answer(run, *todo.pop(0)))
        for commit in of(AppendCommit, actions):
            actions += run.feed(CommitDurable(commit.commit.step))
        todo += [(a.replica, item) for a in of(Assign, actions) for item in everything(a)]
    return run


def commits(run: Driver) -> list[bytes]:
    assert of(Finish, run.log)[-1].reason == "done"
    return [action.commit.encode() for action in of(AppendCommit, run.log)]


def test_a_wide_replica_is_given_as_many_probes_as_it_has_processes() -> None:
    run = Driver(settings(directions=7))
    assert bundles(join(run, "a", 3)) == [("a", [0, 1, 2])]
    assert bundles(join(run, "b", 1)) == [("b", [3])]
    assert bundles(answer(run, "a", probe(0, 1))) == bundles(answer(run, "a", probe(0, 0))) == []
    assert bundles(answer(run, "a", probe(0, 2))) == [("a", [4, 5, 6])]


def test_probes_and_evaluations_are_not_run_at_the_same_time() -> None:
    run = Driver(settings(directions=3, eval_shards=2))
    (first,) = join(run, "a", 4)
    assert [item.kind for item in everything(first)] == [Kind.EVAL, Kind.EVAL]
    given = [of(Assign, answer(run, "a", item)) for item in everything(first)]
    assert [[item.kind for item in everything(a)] for a in given[1]] == [[Kind.PROBE] * 3] and given[0] == []


def test_snapshots_and_digests_are_the_whole_replicas() -> None:
    run = Driver(settings(max_steps=2, directions=4, save_steps=1))
    play(run, join(run, "a", 4))
    alone = [a for a in of(Assign, run.log) if a.item.kind in (Kind.SNAPSHOT, Kind.DIGEST)]
    assert alone and not any(a.beside for a in alone)


def test_a_lost_groups_probes_go_to_others() -> None:
    run = Driver(settings(directions=4))
    join(run, "a", 3), join(run, "b", 1)
    answer(run, "a", probe(0, 1))
    run.feed(ReplicaLost("a", "one of its processes died"))
    assert bundles(join(run, "c", 3)) == [("c", [0, 2])]


def test_a_refusal_takes_back_all_that_ran_beside_it() -> None:
    run = Driver(settings(directions=3))
    join(run, "a", 3)
    actions = run.feed(Refused("a", probe(0, 1), 0, "a commit is missing"))
    assert bundles(actions) == [("a", [0, 1, 2])]
    assert run.state.members["a"].misses == 1


def test_a_failure_of_one_item_leaves_the_others_running() -> None:
    run = Driver(settings(directions=3))
    join(run, "a", 3)
    assert bundles(run.feed(Failed("a", probe(0, 1), "out of memory"))) == []
    assert bundles(join(run, "b", 1)) == [("b", [1])]
    answer(run, "a", probe(0, 0)), answer(run, "b", probe(0, 1))
    assert of(AppendCommit, answer(run, "a", probe(0, 2)))


def test_an_item_that_breaks_group_after_group_ends_the_run() -> None:
    run = Driver(settings(directions=2))
    for name in ("a", "b", "c"):
        join(run, name, 2)
        actions = run.feed(Failed(name, probe(0, 1), "out of memory"))
        run.feed(ReplicaLost(name, "one of its processes failed"))
    (finish,) = of(Finish, actions)
    assert finish.reason == "failed" and "out of memory" in finish.text


def test_an_item_that_breaks_group_after_group_ends_the_run_though_others_live() -> None:
    """None of the groups that failed is alive when the next one does, but one that has not had the item yet."""
    run = Driver(settings(directions=1))
    join(run, "first", 2)
    for i in range(20):
        join(run, f"g{i}", 2)
        (holder,) = [name for name, member in run.state.members.items() if member.items]
        finished = of(Finish, run.feed(Failed(holder, probe(0, 0), "too little memory")))
        if finished:
            break
        run.feed(ReplicaLost(holder, "one of its processes failed"))
    assert finished and finished[0].reason == "failed" and i < 10


def test_short_probes_are_not_lined_up_behind_a_bundle() -> None:
    run = Driver(settings(directions=12, short_probe=1.0))
    play_one = [answer(run, "a", item) for a in join(run, "a", 2) for item in everything(a)]
    assert bundles(play_one[-1]) == [("a", [2, 3])]
    assert run.state.members["a"].ahead is None and not run.state.single


def test_what_is_given_again_is_not_mixed_with_another_kind() -> None:
    run = Driver(settings(directions=2, eval_shards=1))
    join(run, "a", 1), join(run, "b", 2)
    assert run.state.members["a"].item == Item(Kind.EVAL, 0, 0)
    run.feed(ReplicaLost("a", "killed")), run.feed(ReplicaLost("b", "killed"))
    (first,) = join(run, "c", 3)
    assert len({item.kind for item in everything(first)}) == 1


def test_late_items_of_two_kinds_are_not_given_together() -> None:
    run = Driver(settings(directions=1, eval_shards=1, first_deadline=10.0))
    join(run, "a", 1), join(run, "b", 1), join(run, "c", 2)
    assert [[item.kind for item in everything(a)] for a in of(Assign, run.feed(Tick(), now=11.0))] == [[Kind.EVAL]]


def test_what_takes_one_forward_is_not_given_beside_what_may_take_two() -> None:
    """The processes of one replica gather each other's weights, forward by forward."""
    run = Driver(settings(directions=3, optimizer=Optimizer(normalize="curvature")))
    (first,) = join(run, "a", 4)
    assert everything(first) == (Item(Kind.CENTRE, 0),)
    (then,) = of(Assign, run.feed(Answer("a", first.item, SideLoss(1.0, 0.0, 0.0))))
    assert [item.kind for item in everything(then)] == [Kind.PROBE] * 3


def test_seconds_are_per_process() -> None:
    run = Driver(settings(directions=4))
    (assign,) = join(run, "a", 4)
    for item in everything(assign):
        actions = run.feed(Answer("a", item, ProbeScalars(1.0, 2.0, 0.5, 3.0)))
    (commit,) = of(AppendCommit, actions)
    (report,) = of(Report, run.feed(CommitDurable(commit.commit.step)))
    assert (report.record.replicas, report.record.processes, report.record.probe_seconds) == (1, 4, 12.0)
    assert run.state.replay == 0.5


def test_late_probes_are_given_again_together() -> None:
    run = Driver(settings(directions=2, first_deadline=10.0))
    join(run, "a", 2), join(run, "b", 2)
    assert bundles(run.feed(Tick(), now=11.0)) == [("b", [0, 1])]
    assert run.state.counters.late == 2


def test_a_silent_group_is_released_as_one() -> None:
    run = Driver(settings(directions=2, first_deadline=10.0, max_misses=1))
    join(run, "a", 2)
    (release,) = of(Release, run.feed(Tick(), now=21.0))
    assert release.cause == "silent"
    assert bundles(join(run, "b", 2)) == [("b", [0, 1])]


@given(
    directions=st.integers(1, 5),
    microbatches=st.integers(1, 3),
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    split=st.booleans(),
)
def test_the_ledger_is_the_same_whatever_the_assignment(
    directions: int, microbatches: int, widths: list[int], split: bool
) -> None:
    keys = {"directions": directions, "microbatches": microbatches}
    alone = Driver(settings(**keys))
    expected = commits(play(alone, join(alone, "r", 1)))
    run = Driver(settings(**keys, split_signs=split))
    started = [a for i, width in enumerate(widths) for a in join(run, f"r{i}", width)]
    assert commits(play(run, started)) == expected


@given(
    directions=st.integers(1, 5),
    microbatches=st.integers(1, 3),
    shared=st.integers(1, 6),
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_one_sided_probes_share_the_loss_at_the_weights(
    directions: int, microbatches: int, shared: int, widths: list[int]
) -> None:
    """(K + ⌈K/d⌉) M forwards, and the commits of probes that are made of them without any kernel."""
    keys = {"directions": directions, "microbatches": microbatches}
    run = Driver(settings(**keys, one_sided=True, directions_per_batch=shared))
    started = [a for i, width in enumerate(widths) for a in join(run, f"r{i}", width)]
    assert len(run.state.work) == (directions + math.ceil(directions / shared)) * microbatches
    found, previous = commits(play(run, started)), bytes(32)
    for step, record in enumerate(found):
        grid = [Item(Kind.PLUS, step, k, m) for k in range(directions) for m in range(microbatches)]
        beside = [centre(Item(Kind.CENTRE, step, i.part // shared * shared, i.microbatch)) for i in grid]
        probes = [
            ProbeResult.of_one_side(step, i.part, i.microbatch, told(losses(i)[0]), told(loss), 1e-3)
            for i, loss in zip(grid, beside, strict=True)
        ]
        expected = aggregate(step, probes, **keys, learning_rate=0.1, previous=previous).commit
        assert record == expected.encode()
        previous = expected.hash


def test_the_loss_at_the_weights_runs_beside_those_of_a_side_and_comes_first() -> None:
    run = Driver(settings(directions=3, microbatches=2, one_sided=True, directions_per_batch=2))
    (first,) = join(run, "a", 10)
    assert [(i.kind.name, i.part, i.microbatch) for i in everything(first)] == [
        ("CENTRE", 0, 0), ("CENTRE", 0, 1), ("CENTRE", 2, 0), ("CENTRE", 2, 1),
        ("PLUS", 0, 0), ("PLUS", 0, 1), ("PLUS", 1, 0), ("PLUS", 1, 1), ("PLUS", 2, 0), ("PLUS", 2, 1),
    ]  # fmt: skip
    assert str(everything(first)[3]) == "centre of step 0, direction 2, microbatch 1"


@pytest.mark.parametrize(("broken", "left"), [({0}, {2}), ({2}, {0, 1}), ({0, 2}, set())])
def test_a_loss_at_the_weights_that_is_not_finite_leaves_all_its_directions_out(
    broken: set[int], left: set[int]
) -> None:
    run = Driver(settings(directions=3, one_sided=True, directions_per_batch=2))
    (assign,) = join(run, "a", 5)
    actions: tuple[Action, ...] = ()
    for item in everything(assign):
        loss = float("nan") if item.kind is Kind.CENTRE and item.part in broken else 1.0 + item.kind
        actions = run.feed(Answer("a", item, SideLoss(loss, 0.0, 0.0)))
    (commit,) = of(AppendCommit, actions)
    assert {direction for _, direction, coefficient in commit.commit.terms if coefficient} == left
    assert commit.commit.applied == bool(left)


@pytest.mark.parametrize(("shared", "firsts"), [(2, [0, 2, 4]), (3, [0, 3]), (5, [0]), (99, [0])])
def test_an_adaptive_step_has_as_many_losses_at_the_weights_as_batches(shared: int, firsts: list[int]) -> None:
    optimizer = Optimizer(normalize="curvature", width=Width(5, 9))
    run = Driver(settings(directions=7, one_sided=True, directions_per_batch=shared, optimizer=optimizer))
    assert [i.part for i in run.state.queue if i.kind is Kind.CENTRE] == firsts
    assert [i for i in run.state.queue if i.kind is Kind.MINUS] == [Item(Kind.MINUS, 0)]
    assert [i.part for i in run.state.queue if i.kind is Kind.PLUS] == list(range(5))


def test_a_lost_loss_at_the_weights_is_given_again() -> None:
    run = Driver(settings(directions=1, one_sided=True))
    join(run, "a", 1), join(run, "b", 1)
    assert run.state.members["a"].item == Item(Kind.CENTRE, 0)
    assert not of(AppendCommit, answer(run, "b", Item(Kind.PLUS, 0)))
    assert [a.item for a in of(Assign, run.feed(ReplicaLost("a", "killed")))] == [Item(Kind.CENTRE, 0)]
    assert of(AppendCommit, answer(run, "b", Item(Kind.CENTRE, 0)))


def test_evaluations_of_a_kind_that_was_not_timed_yet_are_as_late_as_the_others() -> None:
    """In a bundle the answer that comes last is timed, which that at the weights never is."""
    run = Driver(settings(directions=1, one_sided=True, first_deadline=100.0))
    join(run, "a", 1), join(run, "b", 1)
    run.now = 2.0
    answer(run, "b", Item(Kind.PLUS, 0))
    assert not of(Assign, run.feed(Tick(), now=3.9))
    assert [a.item.kind for a in of(Assign, run.feed(Tick(), now=4.1))] == [Kind.CENTRE]


def test_probes_that_have_something_in_common_are_handed_out_batch_by_batch() -> None:
    keys = {"directions": 3, "microbatches": 2, "directions_per_batch": 2}
    orders = {}
    for by_batch in (False, True):
        run = Driver(settings(**keys, by_batch=by_batch))
        (first,) = join(run, "a", 6)
        orders[by_batch] = [(item.part, item.microbatch) for item in everything(first)]
        orders[str(by_batch)] = commits(play(run, [first]))
    assert orders[True] == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
    assert sorted(orders[False]) == sorted(orders[True]) and orders[False] != orders[True]
    assert orders["False"] == orders["True"]


@pytest.mark.parametrize("by_batch", [True, False])
def test_short_probes_do_not_make_the_long_ones_late(by_batch: bool) -> None:
    """The first probe of a batch takes its gradient, 40 s, and the 39 after it 0.1 s each."""
    run = Driver(settings(directions=40, max_steps=2, by_batch=by_batch, directions_per_batch=40))
    assigned = join(run, "a", 1)
    for k in range(40):
        run.now += 40.0 if k == 0 else 0.1
        actions = answer(run, "a", probe(0, k))
    (commit,) = of(AppendCommit, actions)
    assigned = of(Assign, run.feed(CommitDurable(commit.commit.step)))
    run.feed(Tick(), now=run.now + 50)
    assert assigned[0].item == probe(1, 0) and (run.state.counters.overdue == 0) == by_batch


@pytest.mark.parametrize("name", ["plus", "minus"])
def test_a_loss_that_is_not_finite_on_one_side_leaves_the_direction_out(name: str) -> None:
    run = Driver(settings(directions=2, split_signs=True))
    (assign,) = join(run, "a", 4)
    actions: tuple[Action, ...] = ()
    for item in everything(assign):
        broken = item.part == 1 and item.kind.name.lower() == name
        actions = run.feed(Answer("a", item, SideLoss(float("inf") if broken else 1.0 + item.kind, 0.0, 0.0)))
    (commit,) = of(AppendCommit, actions)
    assert [term[2] for term in commit.commit.terms][1] == 0 != commit.commit.terms[0][2]
