"""Which replicas are started where, and which leave: `rebalance(state, event, now) -> (state, actions)`, pure.

There are three brakes on replicas that fail: the run waits longer and longer before it starts another one, a machine on
which they keep failing is avoided for a while, and a run that has none left after many attempts gives up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from zoray.protocol.machines import Machine, choose, doubled, remembered, rooms, struck
from zoray.protocol.machines import NodeView as NodeView
from zoray.protocol.machines import Policy as Policy
from zoray.protocol.machines import Slot as Slot
from zoray.protocol.machines import SlotPhase as SlotPhase
from zoray.protocol.machines import check_target as check_target


@dataclass(frozen=True, slots=True)
class NodesSeen:
    """All live machines; said about once a second, it is the clock as well.

    Args:
        nodes: the machines as they were at `at`.
        at: when that was. Replicas started since then are not in the machines' `room` yet; None: none have been.
    """

    nodes: tuple[NodeView, ...]
    at: float | None = None


@dataclass(frozen=True, slots=True)
class ReplicaJoined:
    """A replica became active."""

    name: str


@dataclass(frozen=True, slots=True)
class ReplicaGone:
    """A replica is no more. `fault`: it died, failed to start or was put out; not so if it left as it was told to."""

    name: str
    reason: str
    fault: bool


@dataclass(frozen=True, slots=True)
class ScaleRequested:
    """A person wants so many replicas."""

    target: int


MembershipEvent = NodesSeen | ReplicaJoined | ReplicaGone | ScaleRequested


@dataclass(frozen=True, slots=True)
class Launch:
    """Start a replica of this new name on this machine."""

    name: str
    node: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Let an active replica finish what it runs and leave."""

    name: str


@dataclass(frozen=True, slots=True)
class Abandon:
    """End a replica that is still starting."""

    name: str


@dataclass(frozen=True, slots=True)
class Announce:
    """The cluster should have room for so many replicas in all, those that run included."""

    count: int


@dataclass(frozen=True, slots=True)
class Note:
    """Something a person should read."""

    text: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Replicas cannot be kept alive; the run should end with this text. No event has any effect after it."""

    text: str


MembershipAction = Launch | Leave | Abandon | Announce | Note | GiveUp


@dataclass(slots=True)
class Membership:
    """Everything that is known of the replicas. `rebalance` never changes the one it is given.

    Attributes:
        slots: the replicas by name, in the order in which they were started.
        machines: what is remembered of machines on which replicas failed.
        nodes, launched: the machines last seen, and (machine, time) of what was started since.
        strikes: failures in a row; nothing is started before `retry_at`.
        born: how many names were given: `r0`, `r1` and so on, none of them twice.
        announced: the count last announced.
        over: it gave up.
    """

    policy: Policy
    target: int
    slots: dict[str, Slot] = field(default_factory=dict)
    machines: dict[str, Machine] = field(default_factory=dict)
    nodes: tuple[NodeView, ...] = ()
    launched: tuple[tuple[str, float], ...] = ()
    strikes: int = 0
    retry_at: float = -math.inf
    born: int = 0
    announced: int | None = None
    over: bool = False

    def copy(self) -> Membership:
        """A state that can be changed without touching this one."""
        return replace(self, slots=self.slots.copy(), machines=self.machines.copy())

    def wanted(self) -> dict[str, Slot]:
        """The replicas that start or work, oldest first."""
        return {name: slot for name, slot in self.slots.items() if slot.phase is not SlotPhase.LEAVING}


def initial_membership(policy: Policy, target: int) -> Membership:
    """The state of a run that has no replica yet; raises as `check_target` does."""
    check_target(policy, target)
    return Membership(policy, target)


def shortfall(state: Membership) -> int:
    """How many replicas are missing: neither starting nor active."""
    return state.target - len(state.wanted())


def rebalance(state: Membership, event: MembershipEvent, now: float) -> tuple[Membership, tuple[MembershipAction, ...]]:
    """What becomes of the replicas after one event.

    Args:
        state: the state before, which is left as it was.
        event: what happened. Names that are not known, or not any more, are ignored.
        now: the carrier's clock in seconds; it must not go backwards.

    Raises:
        ConfigError: the target asked for is not possible (see `check_target`).
    """
    if state.over:
        return state, ()
    state, actions = state.copy(), list[MembershipAction]()
    match event:
        case NodesSeen():
            _seen(state, event, now, actions)
        case ReplicaJoined(name):
            slot = state.slots.get(name)
            if slot is not None and slot.phase is SlotPhase.STARTING:
                state.slots[name] = Slot(slot.node, SlotPhase.ACTIVE, now)
        case ReplicaGone(name):
            slot = state.slots.pop(name, None)
            # One that was leaving has been replaced already, and may have been killed by us.
            if slot is not None and slot.phase is not SlotPhase.LEAVING and event.fault:
                _fault(state, slot, event.reason, now, actions)
        case ScaleRequested(target):
            check_target(state.policy, target)
            state.target, state.strikes, state.retry_at = target, 0, now
    if not state.over:
        _settle(state, now, actions)
    return state, tuple(actions)


def _seen(state: Membership, event: NodesSeen, now: float, actions: list[MembershipAction]) -> None:
    """Take the new view of the machines, see who has proved itself, and clear machines that drain."""
    state.nodes = event.nodes
    state.launched = tuple(each for each in state.launched if event.at is not None and each[1] >= event.at)
    for name, slot in state.slots.items():
        if _proved(state.policy, slot, now) and not slot.settled:
            # Once per replica: an old one says nothing of those that fail beside it.
            state.slots[name] = replace(slot, settled=True)
            state.strikes = 0
            if slot.node in state.machines:
                state.machines[slot.node] = replace(state.machines[slot.node], strikes=0)
    present = {view.node for view in event.nodes}
    for node, machine in tuple(state.machines.items()):
        if not remembered(state.policy, machine, node in present, now):
            del state.machines[node]
    for node in sorted(view.node for view in event.nodes if view.draining):
        if names := [name for name, slot in state.wanted().items() if slot.node == node]:
            actions.append(Note(f"machine {node} is about to be taken away: {', '.join(names)} must leave it"))
            for name in names:
                _dismiss(state, name, now, actions)


def _proved(policy: Policy, slot: Slot, now: float) -> bool:
    return slot.phase is SlotPhase.ACTIVE and now - slot.since >= policy.settled_after


def _fault(state: Membership, slot: Slot, reason: str, now: float, actions: list[MembershipAction]) -> None:
    """Count a failure, against the run and against the machine. One that had proved itself counts as a first one."""
    policy, proved = state.policy, _proved(state.policy, slot, now)
    state.strikes = 1 if proved else state.strikes + 1
    machine = struck(policy, state.machines.get(slot.node), proved, now)
    state.machines[slot.node] = machine
    if machine.strikes >= policy.node_strikes:
        text = f"machine {slot.node} is avoided for {machine.avoided_until - now:g} s"
        actions.append(Note(f"{text}: {machine.strikes} failures in a row on it, the last one: {reason}"))
    if state.strikes >= policy.hopeless_after and not state.wanted():
        state.over = True
        text = f"{state.strikes} attempts in a row to keep a replica alive failed, and none is left"
        actions.append(GiveUp(f"{text}; the last one: {reason}"))
        return
    delay = doubled(policy.first_delay, state.strikes - 2, policy.longest_delay) if state.strikes > 1 else 0.0
    state.retry_at = now + delay
    if delay:
        text = f"{state.strikes} replicas in a row failed, the last one on machine {slot.node}: {reason}"
        actions.append(Note(f"{text}; the next one is started in {delay:g} s"))


def _settle(state: Membership, now: float, actions: list[MembershipAction]) -> None:
    """Announce the target, and come as near to it as the machines allow."""
    if state.announced != state.target:
        state.announced = state.target
        actions.append(Announce(state.target))
    wanted = state.wanted()
    # Kept are the oldest, active ones first; of two as old as each other the one with the earlier name.
    kept_first = sorted(wanted, key=lambda name: (wanted[name].phase is SlotPhase.STARTING, wanted[name].since))
    for name in reversed(kept_first[state.target :]):
        _dismiss(state, name, now, actions)
    for _ in range(shortfall(state) if now >= state.retry_at else 0):
        node = choose(state.policy, state.machines, rooms(state.nodes, state.launched), state.slots.values(), now)
        if node is None:
            return
        if (machine := state.machines.get(node)) is not None and now < machine.avoided_until:
            actions.append(Note(f"machine {node} is tried though it is avoided: no other has room, no replica is left"))
        name = f"r{state.born}"
        state.born += 1
        state.slots[name] = Slot(node, SlotPhase.STARTING, now)
        state.launched += ((node, now),)
        actions.append(Launch(name, node))


def _dismiss(state: Membership, name: str, now: float, actions: list[MembershipAction]) -> None:
    slot = state.slots[name]
    actions.append(Leave(name) if slot.phase is SlotPhase.ACTIVE else Abandon(name))
    state.slots[name] = Slot(slot.node, SlotPhase.LEAVING, now)
