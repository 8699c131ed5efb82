"""Replicas join, leave, die and go wrong in mid-run on a real Ray; the ledger is that of an undisturbed run.

Faults are placed by step: `at(coordinator, record)` is called in the coordinator's own loop when a step is committed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.lock import RunLock
from launch.restore import base_replica
from tests.integration.conftest import Inputs, Launch, Ran
from tests.integration.warm import WarmFleet
from zoray.errors import ConfigError, RunError
from zoray.ledger import Ledger
from zoray.protocol import RemoveReplica
from zoray.protocol.membership import SlotPhase
from zoray.runs import RunFolder
from zoray.snapshot import replay

STEPS = 40
LONG = {"max_steps": STEPS, "eval_steps": None, "eval_on_start": False}

Act = Callable[[Any], object]


def when(acts: dict[int, Act]) -> Callable[[Any, Any], None]:
    """Do something when so many steps are committed for the first time."""

    def at(coordinator: Any, record: Any) -> None:
        if record.aggregate is not None and record.step + 1 in acts:
            acts.pop(record.step + 1)(coordinator)

    return at


def kill(name: str) -> Act:
    """kill -9 of a replica's process."""
    return lambda coordinator: os.kill(coordinator.roster.admission.introductions[name].pid, signal.SIGKILL)


def wait_for(coordinator: Any, phase: SlotPhase, count: int) -> None:
    """Go on taking in what happens until so many replicas are in a phase (the loop stands still at this step)."""
    while coordinator.roster.count(phase) != count:
        coordinator.inbox.turn(0.1)


def scale_and_wait(target: int) -> Act:
    def act(coordinator: Any) -> None:
        coordinator.scale(target)
        if target > coordinator.roster.count(SlotPhase.ACTIVE):
            wait_for(coordinator, SlotPhase.ACTIVE, target)

    return act


def check_whole(ran: Ran, undisturbed: Ran) -> None:
    """The run came to its end with the ledger and the digest of the undisturbed one, and replay gives that digest."""
    assert ran.finish.reason == "done", ran.finish
    assert ran.ledger == undisturbed.ledger
    assert ran.finish.digest == undisturbed.finish.digest
    with Ledger.open(ran.folder.ledger, repair=False) as ledger:
        replica = base_replica(ran.folder.config(), ledger)
        replay(replica, ledger, None)
    assert replica.digest() == ran.finish.digest


@pytest.fixture(scope="module")
def undisturbed(processes: list[Any], inputs: Inputs) -> Ran:
    """One replica, nothing happens."""
    from actors.coordinator import Coordinator

    config = inputs.config(replicas=1, **LONG)
    folder = RunFolder.create(config, "undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WarmFleet, "idle", processes, raising=False)
        patch.setattr("actors.roster.Fleet", WarmFleet)
        coordinator = Coordinator(config, str(folder.path))
        coordinator.prepare(False)
        return Ran(folder, coordinator.run(), coordinator)


def replicas_by_step(ran: Ran) -> list[int]:
    return [row["replicas"] for row in ran.folder.rows("steps")]


def test_scaled_up_and_down_in_mid_run(warm: None, undisturbed: Ran, inputs: Inputs, launch: Launch) -> None:
    ran = launch(inputs.config(replicas=1, **LONG), at=when({8: scale_and_wait(4), 24: scale_and_wait(2)}))
    check_whole(ran, undisturbed)
    counts = replicas_by_step(ran)
    assert counts[0] == 1 and max(counts) == 4 and counts[-1] == 2
    assert ran.coordinator.status().target == 2


def test_a_newcomer_starts_from_a_snapshot_and_gives_its_digest_first(
    warm: None, undisturbed: Ran, inputs: Inputs, launch: Launch, joined: list[int]
) -> None:
    ran = launch(inputs.config(replicas=1, save_steps=10, **LONG), at=when({25: scale_and_wait(2)}))
    check_whole(ran, undisturbed)
    assert joined == [0, 20]
    members = ran.coordinator.state.members
    assert len(members) == 2 and all(member.proven for member in members.values())
    assert ran.coordinator.state.counters.diverged == 0


def test_killed_replicas_are_replaced(undisturbed: Ran, inputs: Inputs, launch: Launch) -> None:
    """kill -9 of one of two, then of the last one: the run waits for a new one and loses nothing."""

    def last(coordinator: Any) -> None:
        for name in list(coordinator.state.members):
            kill(name)(coordinator)

    ran = launch(inputs.config(replicas=2, **LONG), at=when({5: kill("r0"), 20: last}))
    check_whole(ran, undisturbed)
    assert ran.coordinator.state.counters.lost >= 2
    assert ran.coordinator.roster.members.born >= 4


def test_a_replica_that_is_asked_to_leave_finishes_first(
    warm: None, undisturbed: Ran, inputs: Inputs, launch: Launch
) -> None:
    ran = launch(inputs.config(replicas=3, **LONG), at=when({6: lambda c: c.events.append(RemoveReplica("r1"))}))
    check_whole(ran, undisturbed)
    assert "replica r1 leaves: it was asked to leave" in ran.folder.log.read_text()
    assert ran.coordinator.state.counters.lost == 0


@pytest.mark.parametrize(("replicas", "every"), [(3, 4), (2, 5), (2, None)])
def test_a_flipped_bit_is_found_and_does_not_change_the_result(
    replicas: int, every: int | None, warm: None, undisturbed: Ran, inputs: Inputs, launch: Launch
) -> None:
    """At step 10, between two comparisons: what was committed with the wrong weights is computed again."""

    def flip(coordinator: Any) -> None:
        import ray

        # The newcomers have been compared by now, so this one is trusted.
        assert coordinator.state.members["r1"].proven
        ray.get(list(coordinator.roster.fleet.call("r1", "flip")))

    ran = launch(inputs.config(replicas=replicas, digest_every=every, **LONG), at=when({10: flip}))
    check_whole(ran, undisturbed)
    counters = ran.coordinator.state.counters
    assert counters.diverged == (1 if replicas > 2 else 2) and counters.rewinds == 1
    log = ran.folder.log.read_text()
    assert "differs from" in log and "are computed again" in log
    rows = [row["step"] for row in ran.folder.rows("steps")]
    assert rows == list(range(STEPS))


def test_a_joiner_with_other_code_is_refused_and_the_run_goes_on(
    warm: None, undisturbed: Ran, inputs: Inputs, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from actors.admission import Admission

    introduced = Admission._introduced

    def other_code(self: Admission, name: str, introductions: list[Any]) -> None:
        if name == "r1":
            introductions = [replace(each, identity=replace(each.identity, code="x")) for each in introductions]
        introduced(self, name, introductions)

    monkeypatch.setattr(Admission, "_introduced", other_code)

    def grow(coordinator: Any) -> None:
        coordinator.scale(2)
        while "r2" not in coordinator.roster.members.slots:
            coordinator.inbox.turn(0.1)
        wait_for(coordinator, SlotPhase.ACTIVE, 2)

    ran = launch(inputs.config(replicas=1, **LONG), at=when({5: grow}))
    check_whole(ran, undisturbed)
    told = [text for text in ran.coordinator.progress().warnings if "r1 cannot join" in text]
    assert len(told) == 1 and "another code of Zoray" in told[0]


@pytest.mark.parametrize(("part", "says"), [("__ray_ready__", "has no process"), ("introduce", "hangs")])
def test_a_newcomer_that_hangs_is_replaced(
    warm: None, undisturbed: Ran, inputs: Inputs, launch: Launch, monkeypatch: pytest.MonkeyPatch, part: str, says: str
) -> None:
    class Never:
        """A reference whose result does not come."""

        future = Future

    call, later = WarmFleet.call, 0.0

    def hang(self: WarmFleet, name: str, method: str, *arguments: Any) -> Any:
        return (Never(),) if (name, method) == ("r1", part) else call(self, name, method, *arguments)

    monkeypatch.setattr(WarmFleet, "call", hang)
    monkeypatch.setattr("actors.admission.time", SimpleNamespace(monotonic=lambda: time.monotonic() + later))

    def grow(coordinator: Any) -> None:
        nonlocal later
        coordinator.scale(2)
        while coordinator.roster.admission._waiting.get("r1", ("", 0.0))[0] != part:
            coordinator.inbox.turn(0.1)
        later = 3600.0
        wait_for(coordinator, SlotPhase.ACTIVE, 2)

    ran = launch(inputs.config(replicas=1, **LONG), at=when({5: grow}))
    check_whole(ran, undisturbed)
    told = [text for text in ran.coordinator.progress().warnings if "r1" in text]
    assert len(told) == 1 and says in told[0]


def test_targets_out_of_range_are_refused(warm: None, inputs: Inputs, launch: Launch) -> None:
    said: list[str] = []

    def ask(coordinator: Any) -> None:
        for target in (0, -1, 3):
            with pytest.raises(ConfigError) as caught:
                coordinator.scale(target)
            said.append(str(caught.value))
        coordinator.scale(1)

    ran = launch(inputs.config(replicas={"min": 1, "max": 2}, **LONG), at=when({3: ask}))
    assert ran.finish.reason == "done" and len(said) == 3
    assert "2" in said[2] and ran.coordinator.status().target == 1


def test_a_range_follows_what_the_cluster_offers(warm: None, undisturbed: Ran, inputs: Inputs, launch: Launch) -> None:
    """Three machines with room for one each appear one after the other; then one of them drains."""
    import ray

    from zoray.protocol.machines import NodeView
    from zoray.protocol.membership import NodesSeen

    node = ray.nodes()[0]["NodeID"]

    def offer(room: int) -> Act:
        def act(coordinator: Any) -> None:
            coordinator.roster._rebalance(NodesSeen((NodeView(node, room),)))
            wait_for(coordinator, SlotPhase.ACTIVE, 1 + room)

        return act

    announced: list[int] = []

    class Small(WarmFleet):
        def machines(self) -> tuple[NodeView, ...]:
            return (NodeView(node, 1 - len(self._actors)),)

        def watch(self, tell: Any) -> None:
            """This test says itself what there is."""

        def announce(self, count: int) -> None:
            announced.append(count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.roster.Fleet", Small)
        ran = launch(inputs.config(replicas={"min": 1, "max": 3}, **LONG), at=when({6: offer(2)}))
    check_whole(ran, undisturbed)
    assert replicas_by_step(ran)[0] == 1 and replicas_by_step(ran)[-1] == 3
    assert announced == [3, 0]


def test_a_second_coordinator_is_refused(warm: None, inputs: Inputs, launch: Launch) -> None:
    def second(coordinator: Any) -> None:
        from actors.coordinator import Coordinator

        with pytest.raises(RunError, match="pid"):
            Coordinator(coordinator.config, str(coordinator.folder.path)).prepare(True)

    ran = launch(inputs.config(replicas=1, **LONG), at=when({3: second}))
    assert ran.finish.reason == "done"
    RunLock(ran.folder.path).acquire().release()


def test_a_coordinator_that_was_overtaken_stops_writing(warm: None, inputs: Inputs, launch: Launch) -> None:
    ran = launch(inputs.config(replicas=1, **LONG), at=when({3: lambda c: setattr(c.lock, "lost", True)}))
    assert ran.finish.reason == "storage" and "another coordinator" in ran.finish.text
    assert Ledger.open(ran.folder.ledger, repair=False).next_step <= 5


def test_a_full_disk_ends_the_run_and_loses_nothing(
    warm: None, undisturbed: Ran, inputs: Inputs, launch: Launch
) -> None:
    from dataclasses import replace

    def fill(coordinator: Any) -> None:
        def full(fd: int, data: bytes, offset: int) -> int:
            raise OSError(28, "No space left on device")

        coordinator.ledger._files = replace(coordinator.ledger._files, write=full)

    ran = launch(inputs.config(replicas=2, **LONG), at=when({7: fill}))
    assert ran.finish.reason == "storage" and "No space left" in str(ran.finish.text)
    assert ran.folder.read_state()["state"] == "storage"
    assert Ledger.open(ran.folder.ledger, repair=False).next_step == 7
    check_whole(launch(inputs.config(replicas=1, **LONG), ran.folder), undisturbed)


def test_status_of_a_run_in_progress(warm: None, inputs: Inputs, launch: Launch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def look(coordinator: Any) -> None:
        # As another process would: from another thread than the loop's.
        thread = threading.Thread(target=lambda: seen.append(coordinator.status()))
        thread.start()
        thread.join()

    ran = launch(inputs.config(replicas=2, **LONG), at=when({10: look}))
    (status,) = seen
    assert (status.run, status.state, status.target) == (ran.folder.name, "running", 2)
    assert status.progress.step == 10 and {replica.state for replica in status.replicas} == {"active"}
    assert all(replica.pid and replica.step is not None and replica.lag is not None for replica in status.replicas)
