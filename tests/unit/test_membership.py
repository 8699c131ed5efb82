"""Which replicas are started where, and which leave: rule by rule, then over random histories of a small cluster."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import pytest
from hypothesis import event as note_event
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zoray.errors import ConfigError
from zoray.protocol.machines import Machine
from zoray.protocol.membership import (
    Abandon,
    Announce,
    GiveUp,
    Launch,
    Leave,
    Membership,
    MembershipAction,
    MembershipEvent,
    NodesSeen,
    NodeView,
    Note,
    Policy,
    ReplicaGone,
    ReplicaJoined,
    ScaleRequested,
    SlotPhase,
    check_target,
    initial_membership,
    rebalance,
    shortfall,
)

T = TypeVar("T", bound=MembershipAction)
POLICY = Policy(1, None)


def of(kind: type[T], actions: Iterable[MembershipAction]) -> list[T]:
    return [action for action in actions if isinstance(action, kind)]


class Driver:
    """The kernel with a clock. Every event must leave the state it is given as it was."""

    def __init__(self, target: int, policy: Policy = POLICY) -> None:
        self.state: Membership = initial_membership(policy, target)
        self.now = 0.0
        self.log: list[MembershipAction] = []

    def feed(self, event: MembershipEvent, now: float | None = None) -> list[MembershipAction]:
        self.now = self.now if now is None else now
        given, before = self.state, repr(self.state)
        self.state, actions = rebalance(given, event, self.now)
        assert repr(given) == before
        self.log += actions
        return list(actions)

    def see(self, *nodes: NodeView, now: float | None = None, **rooms: int) -> list[MembershipAction]:
        return self.feed(NodesSeen((*nodes, *(NodeView(node, room) for node, room in rooms.items()))), now)

    def join(self, *names: str, now: float | None = None) -> list[MembershipAction]:
        return [action for name in names for action in self.feed(ReplicaJoined(name), now)]

    def fail(self, name: str, now: float | None = None, reason: str = "it died") -> list[MembershipAction]:
        return self.feed(ReplicaGone(name, reason, fault=True), now)

    def left(self, name: str, now: float | None = None) -> list[MembershipAction]:
        return self.feed(ReplicaGone(name, "it left", fault=False), now)

    def phases(self) -> dict[str, SlotPhase]:
        return {name: slot.phase for name, slot in self.state.slots.items()}


def running(target: int, policy: Policy = POLICY, **rooms: int) -> Driver:
    """A run whose replicas are active since 0 s, on machines seen without any more room."""
    run = Driver(target, policy)
    run.see(**rooms)
    run.join(*run.state.slots)
    run.see(**dict.fromkeys(rooms, 0))
    assert list(run.phases().values()) == [SlotPhase.ACTIVE] * target
    return run


# Where replicas are started.


def test_missing_replicas_are_launched_at_once_as_far_as_there_is_room() -> None:
    run = Driver(5)
    assert run.see(a=2, b=1) == [Announce(5), Launch("r0", "a"), Launch("r1", "b"), Launch("r2", "a")]
    assert shortfall(run.state) == 2
    assert run.join("r0", "r1", "r2") == []
    assert run.see(a=0, b=0, now=1.0) == [] and run.see(a=0, b=1, now=2.0) == [Launch("r3", "b")]


def test_machine_with_the_most_room_comes_first_then_fewest_of_ours_then_the_name() -> None:
    assert [a.node for a in of(Launch, Driver(4).see(c=1, b=3, a=1))] == ["b", "b", "a", "c"]
    run = running(1, a=1)
    run.see(b=1, a=1)
    assert run.feed(ScaleRequested(2)) == [Announce(2), Launch("r1", "b")]


def test_room_is_not_given_twice_before_the_next_look() -> None:
    run = Driver(1)
    run.see(a=2)
    assert of(Launch, run.feed(ScaleRequested(4))) == [Launch("r1", "a")]
    # The failed one may still hold its place; only a new look tells.
    assert of(Launch, run.fail("r1")) == []
    assert of(Launch, run.see(a=1)) == [Launch("r2", "a")]


def test_look_from_before_a_launch_does_not_undo_it() -> None:
    run = Driver(1)
    run.see(a=2, now=10.0)
    run.feed(ScaleRequested(9), now=11.0)
    assert run.state.born == 2
    assert run.feed(NodesSeen((NodeView("a", 2),), at=10.5), now=11.5) == [Launch("r2", "a")]
    assert run.feed(NodesSeen((NodeView("a", 2),), at=11.2), now=12.0) == [Launch("r3", "a")]


def test_too_many_starting_ones_go_first_and_the_newest_of_each() -> None:
    run = Driver(6)
    run.see(a=9)
    run.join("r3", now=1.0)
    run.join("r0", "r1", now=2.0)
    assert run.feed(ScaleRequested(2)) == [Announce(2), Abandon("r5"), Abandon("r4"), Abandon("r2"), Leave("r1")]
    assert shortfall(run.state) == 0
    # Those that leave stay known, and are not asked again.
    assert run.see(a=9, now=3.0) == [] and len(run.state.slots) == 6
    assert run.feed(ScaleRequested(1)) == [Announce(1), Leave("r0")]


def test_replica_that_leaves_counts_no_more_though_it_is_still_there() -> None:
    run = running(2, a=2)
    run.feed(ScaleRequested(1))
    run.see(a=1)
    assert run.feed(ScaleRequested(2)) == [Announce(2), Launch("r2", "a")]
    assert run.join("r1") == [] and run.phases()["r1"] is SlotPhase.LEAVING
    assert run.fail("r1") == [] and run.state.strikes == 0 and not run.state.machines


def test_unknown_names_are_ignored_and_what_is_said_twice_counts_once() -> None:
    run = Driver(1)
    run.see(a=1)
    assert run.join("r7") == [] and run.fail("r7") == []
    run.join("r0", now=1.0)
    run.join("r0", now=50.0)
    assert run.state.slots["r0"].since == 1.0
    run.fail("r0")
    run.fail("r0")
    assert run.state.strikes == 1


# Machines that drain, and machines that are gone.


def test_draining_machine_is_left_and_replacements_start_elsewhere() -> None:
    run = Driver(3)
    run.see(a=3)
    run.join("r0", "r1")
    actions = run.see(NodeView("a", 5, draining=True), NodeView("b", 2))
    assert [action for action in actions if not isinstance(action, Note)] == [
        Leave("r0"), Leave("r1"), Abandon("r2"), Launch("r3", "b"), Launch("r4", "b"),
    ]  # fmt: skip
    assert "machine a is about to be taken away" in of(Note, actions)[0].text
    assert run.see(NodeView("a", 5, draining=True), NodeView("b", 0)) == []
    assert run.left("r0") == [] and run.state.strikes == 0
    assert of(Launch, run.see(c=1)) == [Launch("r5", "c")]


def test_machine_that_is_gone_keeps_its_replicas_until_they_are_told_gone() -> None:
    run = running(2, a=1, b=1)
    assert run.see(b=0) == [] and len(run.state.slots) == 2
    assert run.left("r0") == [] and shortfall(run.state) == 1
    assert run.see(a=0, b=1) == [Launch("r2", "b")]


# Failures in a row.


def test_first_failure_is_made_good_at_once_then_the_waits_double() -> None:
    run = Driver(2, Policy(1, None, longest_delay=5.0, node_strikes=99, hopeless_after=99))
    run.see(good=1)
    run.join("r0")
    run.see(a=99)
    waits, now = [], 0.0
    for _ in range(6):
        name, failed = list(run.state.slots)[-1], now
        launched = of(Launch, run.fail(name, now=failed))
        while not launched:
            now += 0.25
            launched = of(Launch, run.see(a=99, now=now))
        waits.append(now - failed)
    assert waits == [0.0, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert "the next one is started in 2 s" in of(Note, run.log)[1].text


@pytest.mark.parametrize(("lived", "strikes", "at_once"), [(59.0, 4, False), (60.0, 1, True)])
def test_replica_that_had_settled_counts_as_a_first_failure(lived: float, strikes: int, at_once: bool) -> None:
    run = running(3, Policy(1, None, node_strikes=99), a=1, b=1, c=1)
    run.state = replace(run.state, strikes=3, retry_at=1e6)
    run.see(a=1, b=0, c=0, now=0.5)
    launched = of(Launch, run.fail("r0", now=lived))
    assert (run.state.strikes, bool(launched)) == (strikes, at_once)


def test_replica_that_settles_ends_the_row_once() -> None:
    run = running(2, Policy(1, None, node_strikes=99, hopeless_after=99), a=2)
    run.see(a=9, now=50.0)
    run.fail("r1")
    assert run.state.strikes == 1 and run.state.machines["a"].strikes == 1
    run.see(a=9, now=60.0)
    assert run.state.strikes == 0 and not run.state.machines
    for index in range(2, 6):
        run.see(a=9, now=run.now + 100.0)
        run.fail(f"r{index}")
        run.see(a=9, now=run.now + 1.0)
    assert run.state.strikes == 4, "an old replica must not take the brake off"


def test_leaving_as_asked_is_no_failure_and_is_replaced_at_once() -> None:
    run = running(1, a=1)
    run.see(a=1)
    assert run.left("r0") == [Launch("r1", "a")] and run.state.strikes == 0


# Machines on which replicas keep failing.


def strike(run: Driver, *names: str, node: str = "bad") -> list[MembershipAction]:
    actions = []
    for name in names:
        assert run.state.slots[name].node == node
        actions += run.fail(name, reason="no such device")
    return actions


def test_machine_with_three_failures_in_a_row_is_avoided_then_tried_once() -> None:
    run = running(1, Policy(1, None, first_delay=0.0, longest_delay=0.0), good=1)
    run.see(bad=9, good=0)
    run.feed(ScaleRequested(4))
    text = strike(run, "r1", "r2", "r3")[-1]
    assert isinstance(text, Note)
    assert text.text == "machine bad is avoided for 30 s: 3 failures in a row on it, the last one: no such device"
    # Those that start there already are let alone.
    assert shortfall(run.state) == 1 and run.see(bad=9, good=0, now=29.9) == []
    strike(run, "r4", "r5")
    assert run.state.machines["bad"].avoided_until == 29.9 + 120.0
    run.join("r0")
    assert run.see(bad=9, good=0, now=149.8) == [] and shortfall(run.state) == 3
    assert of(Launch, run.see(bad=9, good=0, now=149.9)) == [Launch("r6", "bad")]
    assert run.join("r6", now=150.0) == [] and run.see(bad=9, good=0, now=209.9) == []
    assert [a.node for a in of(Launch, run.see(bad=9, good=0, now=210.0))] == ["bad"] * 2


def test_machine_that_flaps_is_tried_again_for_ever_ever_more_rarely() -> None:
    run = running(1, Policy(1, None, first_delay=0.0, longest_delay=0.0, longest_node_delay=100.0), good=1)
    run.feed(ScaleRequested(2))
    tries: list[float] = []
    for second in range(1000):
        for launch in of(Launch, run.see(good=0, bad=4, now=float(second))):
            tries.append(run.now)
            run.fail(launch.name)
            while run.state.slots.keys() - {"r0"}:
                tries.append(run.now)
                run.fail(list(run.state.slots)[-1])
    gaps = [later - earlier for earlier, later in pairwise(tries)]
    assert gaps[:5] == [0.0, 0.0, 30.0, 60.0, 100.0] and set(gaps[5:]) == {100.0} and len(gaps) > 10


def test_trusted_machines_come_before_one_on_trial() -> None:
    run = running(1, Policy(1, None, first_delay=0.0, longest_delay=0.0), good=1)
    run.see(bad=9)
    run.feed(ScaleRequested(2))
    strike(run, "r1", "r2", "r3")
    assert [a.node for a in of(Launch, run.see(bad=9, good=2, now=5.0))] == ["good"]
    run.see(good=0)
    run.feed(ScaleRequested(5))
    assert [a.node for a in of(Launch, run.see(bad=9, good=3, now=31.0))] == ["good"] * 2 + ["bad"]


def test_only_a_replica_of_the_trial_itself_holds_up_a_trial() -> None:
    run = running(1, Policy(1, None, first_delay=0.0, longest_delay=0.0), bad=1)
    run.see(bad=9)
    run.feed(ScaleRequested(2))
    strike(run, "r1", "r2", "r3")
    assert of(Launch, run.see(bad=9, now=30.0)) == [Launch("r4", "bad")]
    assert run.feed(ScaleRequested(1)) == [Announce(1), Abandon("r4")]
    assert run.feed(ScaleRequested(3)) == [Announce(3), Launch("r5", "bad")]


def test_settled_neighbour_clears_the_strikes_but_does_not_end_an_avoidance() -> None:
    run = running(1, Policy(1, None, first_delay=0.0, longest_delay=0.0, node_delay=90.0), bad=1)
    run.see(bad=9)
    run.feed(ScaleRequested(2))
    strike(run, "r1", "r2", "r3")
    run.feed(ScaleRequested(4))
    assert run.see(bad=9, now=60.0) == [] and run.state.machines["bad"].strikes == 0
    assert run.see(bad=9, now=89.9) == []
    assert len(of(Launch, run.see(bad=9, now=90.0))) == 3 and not run.state.machines


@pytest.mark.parametrize("node_strikes", [3, 1])
def test_settled_replica_that_dies_is_a_first_strike_for_its_machine(node_strikes: int) -> None:
    run = running(1, Policy(1, None, node_strikes=node_strikes), bad=1)
    run.see(bad=9, now=60.0)
    run.state = replace(run.state, machines={"bad": Machine(strikes=4, avoided_until=190.0)})
    run.fail("r0", now=100.0)
    assert run.state.machines["bad"] == Machine(strikes=1, avoided_until=190.0)


def test_run_without_any_replica_tries_the_machine_whose_avoidance_ends_soonest() -> None:
    run = Driver(2, Policy(1, None, node_strikes=1, hopeless_after=9))
    run.see(a=1, b=1)
    run.fail("r0", now=1.0)
    actions = run.fail("r1", now=2.0)
    assert not of(Launch, actions) and run.state.retry_at == 3.0
    assert of(Launch, run.see(a=1, b=9, now=2.9)) == []
    actions = run.see(a=1, b=9, now=3.0)
    assert of(Launch, actions) == [Launch("r2", "a")] and "though it is avoided" in of(Note, actions)[0].text
    assert of(Launch, run.see(a=0, b=9, now=31.9)) == []
    assert of(Launch, run.see(a=0, b=9, now=32.0)) == [Launch("r3", "b")]


def test_records_of_machines_outlive_a_short_absence_but_not_a_long_one() -> None:
    run = running(1, Policy(1, None, first_delay=0.0, longest_delay=0.0, node_strikes=2), good=1)
    run.see(bad=9)
    run.feed(ScaleRequested(2))
    strike(run, "r1")
    run.see(good=0, now=1.0)
    assert run.state.machines["bad"].strikes == 1
    run.see(good=0, bad=9, now=2.0)
    strike(run, "r2")
    run.see(good=0, now=31.0)
    assert "bad" in run.state.machines
    run.see(good=0, now=700.0)
    assert "bad" not in run.state.machines


# Giving up.


def test_run_gives_up_after_six_failures_in_a_row_and_then_does_nothing() -> None:
    run = Driver(1)
    while not of(GiveUp, run.log):
        run.see(a=9, now=run.now + 0.5)
        for name in run.state.slots:
            run.fail(name, reason=f"{name} ran out of memory")
    (giving_up,) = of(GiveUp, run.log)
    assert "6 attempts" in giving_up.text and "r5 ran out of memory" in giving_up.text
    assert run.log[-1] is giving_up and run.state.born == 6
    assert run.feed(ScaleRequested(5)) == [] and run.see(a=9) == [] and run.join("r5") == []


def test_run_does_not_give_up_while_a_replica_is_left() -> None:
    run = Driver(9)
    run.see(a=9)
    run.join("r0")
    for index in range(1, 9):
        run.fail(f"r{index}")
    assert not of(GiveUp, run.log) and run.state.strikes == 8
    assert of(GiveUp, run.fail("r0"))
    settled = running(1, a=1)
    settled.state = replace(settled.state, strikes=50)
    assert not of(GiveUp, settled.fail("r0", now=60.0))


# Targets.


def test_scaling_announces_and_takes_the_brake_off() -> None:
    run = Driver(1)
    assert run.join("nobody") == [Announce(1)]
    run.see(a=1)
    run.fail("r0")
    run.see(a=1)
    run.fail("r1")
    assert run.see(a=1) == [] and run.state.retry_at == 1.0
    assert run.feed(ScaleRequested(1)) == [Launch("r2", "a")] and run.state.strikes == 0
    assert run.feed(ScaleRequested(3)) == [Announce(3)] and run.feed(ScaleRequested(3)) == []


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (0, "0 replicas: it would stand still"),
        (-3, "There cannot be -3 replicas"),
        (1, "1 is below the least number of replicas this run may have, 2"),
        (9, "9 is above the largest number of replicas this run may have, 8"),
    ],
)
def test_impossible_targets_are_refused(target: int, text: str) -> None:
    policy = Policy(2, 8)
    run = Driver(2, policy)
    for refuse in (lambda: check_target(policy, target), lambda: run.feed(ScaleRequested(target))):
        with pytest.raises(ConfigError, match=text) as error:
            refuse()
        assert error.value.where == "replicas" and "ask for 2 to 8" in str(error.value.advice)
    with pytest.raises(ConfigError):
        initial_membership(policy, target)
    assert run.state.target == 2


def test_possible_targets_are_accepted() -> None:
    for target in range(2, 9):
        check_target(Policy(2, 8), target)
    for target in (1, 4, 10**6):
        check_target(Policy(4, None), target)
    with pytest.raises(ConfigError) as error:
        check_target(Policy(4, None), 0)
    assert error.value.advice == "ask for 1 or more, or stop the run"


@pytest.mark.parametrize(
    "changes",
    [
        {"minimum": 0}, {"maximum": 1}, {"first_delay": -1.0}, {"longest_delay": 0.5}, {"settled_after": math.nan},
        {"node_strikes": 0}, {"node_delay": -1.0}, {"longest_node_delay": math.inf}, {"hopeless_after": 0},
    ],
)  # fmt: skip
def test_policies_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        Policy(**{"minimum": 2, "maximum": 8, **changes})


# Random histories.

QUICK = Policy(
    1, 6, first_delay=1.0, longest_delay=8.0, settled_after=5.0, node_strikes=2, node_delay=4.0, longest_node_delay=16.0
)
START, GOODBYE = 3.0, 2.0
CALM = QUICK.longest_delay + QUICK.longest_node_delay + QUICK.settled_after + 2 * (START + GOODBYE) + 5.0


class Cluster(Driver):
    """Machines with room for so many processes, which start, fail, die and leave; all told a little late."""

    def __init__(self, target: int, policy: Policy = QUICK) -> None:
        super().__init__(target, policy)
        self.capacity: dict[str, int] = {}
        self.draining: set[str] = set()
        self.sick: set[str] = set()
        self.processes: dict[str, str] = {}
        self.active: set[str] = set()
        self.names: set[str] = set()
        self.timers: list[tuple[float, int, str, str]] = []
        self.timed = 0
        self.launched: list[tuple[float, str]] = []

    def later(self, seconds: float, what: str, name: str) -> None:
        self.timed += 1
        heapq.heappush(self.timers, (self.now + seconds, self.timed, what, name))

    def tell(self, event: MembershipEvent) -> None:
        known = set(self.state.slots)
        for action in self.feed(event):
            if isinstance(action, Launch):
                self.start(action)
            elif isinstance(action, Leave | Abandon):
                assert action.name in known
                self.later(GOODBYE, "left", action.name)
        assert self.state.over or 0 <= shortfall(self.state) <= self.state.target
        assert set(self.state.slots) <= self.names

    def start(self, launch: Launch) -> None:
        assert launch.name not in self.names
        self.names.add(launch.name)
        self.processes[launch.name] = launch.node
        self.launched.append((self.now, launch.node))
        assert launch.node in self.seen and not self.seen[launch.node].draining
        # What was seen is true until the next look, whatever has happened to the machine since.
        self.room[launch.node] -= 1
        assert self.room[launch.node] >= 0
        self.later(START, "failed" if launch.node in self.sick else "joined", launch.name)

    def look(self) -> None:
        used = Counter(self.processes.values())
        views = [
            NodeView(node, max(0, capacity - used[node]), node in self.draining)
            for node, capacity in self.capacity.items()
        ]
        self.seen = {view.node: view for view in views}
        self.room = {view.node: view.room for view in views}
        self.tell(NodesSeen(tuple(views)))

    def end(self, name: str, reason: str, fault: bool, delay: float = 0.5) -> None:
        if self.processes.pop(name, None) is not None:
            self.active.discard(name)
            self.later(delay, f"{fault:d}{reason}", name)

    def due(self, what: str, name: str) -> None:
        if what[0] in "01":
            self.tell(ReplicaGone(name, what[1:], what[0] == "1"))
        elif what == "joined" and name in self.processes:
            self.active.add(name)
            self.tell(ReplicaJoined(name))
        elif what in ("failed", "left"):
            self.end(name, what, fault=what == "failed", delay=0.0)

    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            end = self.now + 1.0
            while self.timers and self.timers[0][0] <= end:
                self.now, _, what, name = heapq.heappop(self.timers)
                self.due(what, name)
            self.now = end
            self.look()

    def do(self, operation: tuple[str, str, int]) -> None:
        what, node, number = operation
        match what:
            case "wait":
                self.wait(number)
            case "scale":
                self.tell(ScaleRequested(1 + number % 6))
            case "machine":
                self.capacity[node] = number % 5
            case "drain" | "sick":
                getattr(self, {"drain": "draining", "sick": "sick"}[what]).symmetric_difference_update({node})
            case "power":
                self.capacity.pop(node, None)
                for name in [name for name, at in self.processes.items() if at == node]:
                    self.end(name, "its machine is gone", fault=number % 2 == 0)
            case "kill" if self.processes:
                self.end(list(self.processes)[number % len(self.processes)], "killed", fault=True)
            case "noise":
                for name in (f"r{number}", "nobody"):
                    if name not in self.processes and not any(name == timer[3] for timer in self.timers):
                        self.tell(ReplicaJoined(name) if number % 2 else ReplicaGone(name, "again", fault=True))

    def heal(self, room: int) -> None:
        """From now on nothing goes wrong, and there is room on every machine there ever was."""
        self.sick.clear()
        self.draining.clear()
        self.capacity = dict.fromkeys((*self.capacity, *NODES[:1]), room)
        self.timers = [(at, n, "joined" if what == "failed" else what, name) for at, n, what, name in self.timers]
        heapq.heapify(self.timers)

    def serving(self) -> int:
        return sum(phase is SlotPhase.ACTIVE for phase in self.phases().values())


NODES = ("a", "b", "c")
KINDS = ("wait", "wait", "wait", "scale", "machine", "machine", "drain", "sick", "power", "kill", "kill", "noise")
History = list[tuple[str, str, int]]
histories = st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(NODES), st.integers(0, 12)), max_size=40)


sickness = st.sets(st.sampled_from(NODES))


def play(target: int, history: History, policy: Policy = QUICK, sick: Iterable[str] = ()) -> Cluster:
    """A cluster of two machines after a history; everything that must hold after each event is asserted on the way."""
    cluster = Cluster(target, policy)
    cluster.capacity, cluster.sick = {"a": 3, "b": 2}, set(sick)
    cluster.look()
    for operation in history:
        cluster.do(operation)
    return cluster


@settings(max_examples=150)
@given(st.integers(1, 6), histories, sickness, st.booleans())
@example(3, [("wait", "a", 12)] * 4, {"a", "b"}, True)
def test_calm_cluster_reaches_the_target_whatever_happened_before(
    target: int, history: History, sick: set[str], patient: bool
) -> None:
    cluster = play(target, history, replace(QUICK, hopeless_after=999 if patient else 6), sick)
    cluster.heal(room=6)
    cluster.wait(math.ceil(CALM))
    note_event(f"gave up: {cluster.state.over}")
    if not cluster.state.over:
        assert cluster.serving() == cluster.state.target
        assert set(cluster.phases()) == set(cluster.processes) == cluster.active
        born = cluster.state.born
        cluster.wait(20)
        assert cluster.state.born == born, "a calm cluster is let alone"


@settings(max_examples=100)
@given(st.integers(1, 6), histories, sickness)
@example(3, [("wait", "a", 12)] * 4, {"a", "b"})
def test_run_gives_up_only_without_replicas_after_enough_failures(
    target: int, history: History, sick: set[str]
) -> None:
    cluster = play(target, history, sick=sick)
    note_event(f"gave up: {cluster.state.over}")
    said = of(GiveUp, cluster.log)
    assert len(said) == cluster.state.over
    if said:
        assert cluster.log[-1] is said[0] and cluster.state.strikes >= QUICK.hopeless_after
        assert SlotPhase.STARTING not in cluster.phases().values() and not cluster.serving()
    announced = [action.count for action in of(Announce, cluster.log)]
    assert announced[0] == target and all(a != b for a, b in pairwise(announced))


@settings(max_examples=50)
@given(histories)
def test_machine_that_flaps_is_tried_again_eventually(history: History) -> None:
    cluster = play(2, history, replace(QUICK, hopeless_after=999))
    cluster.heal(room=0)
    for node in NODES:
        cluster.do(("power", node, 1))
    cluster.capacity, cluster.sick = {"a": 2, "bad": 4}, {"bad"}
    cluster.look()
    cluster.tell(ScaleRequested(5))
    begin = cluster.now
    cluster.wait(200)
    tries = [at for at, node in cluster.launched if node == "bad"]
    longest = QUICK.longest_node_delay + QUICK.longest_delay + START + 2.0
    assert len(tries) > 5 and max(b - a for a, b in pairwise([begin, *tries, cluster.now])) <= longest
    assert cluster.serving() == 2
    cluster.sick.clear()
    cluster.wait(math.ceil(CALM))
    assert cluster.serving() == 5


def test_states_and_actions_depend_on_nothing_but_the_events() -> None:
    history = [("kill", "a", 1), ("wait", "a", 9), ("drain", "a", 0), ("wait", "a", 9), ("power", "b", 0)]
    first, second = play(4, history), play(4, history)
    assert first.log == second.log and first.state == second.state
