"""The machines a run may use: its policy, what is remembered of each machine, and the choice of one for a replica."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum

from zoray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Policy:
    """How many replicas a run may have, and how patient it is with failures. Times are in seconds.

    Args:
        minimum, maximum: the targets a person may scale to; maximum None: any from 1 on.
        first_delay: wait after the second failure in a row; the first is made good at once, each further one waits
            twice as long, up to `longest_delay`.
        settled_after: a replica that has been active for so long has proved itself and its machine.
        node_strikes: after so many failures in a row on one machine it is avoided for `node_delay`; each further one
            doubles that, up to `longest_node_delay`.
        hopeless_after: after so many failures in a row, and with no replica left, the run gives up.

    Raises:
        ConfigError: a value is too small, or not finite.
    """

    minimum: int
    maximum: int | None
    first_delay: float = 1.0
    longest_delay: float = 60.0
    settled_after: float = 60.0
    node_strikes: int = 3
    node_delay: float = 30.0
    longest_node_delay: float = 600.0
    hopeless_after: int = 6

    def __post_init__(self) -> None:
        lowest = {
            "minimum": 1, "first_delay": 0.0, "longest_delay": self.first_delay, "settled_after": 0.0,
            "node_strikes": 1, "node_delay": 0.0, "longest_node_delay": self.node_delay, "hopeless_after": 1,
        }  # fmt: skip
        if self.maximum is not None:
            lowest["maximum"] = self.minimum
        for key, low in lowest.items():
            if not low <= (value := getattr(self, key)) < math.inf:
                raise ConfigError(f"{key} = {value}", where=key, advice=f"use a finite value of at least {low:g}")


def check_target(policy: Policy, target: int) -> None:
    """Refuse a number of replicas that the run cannot be scaled to.

    Raises:
        ConfigError: it is not positive, or outside the policy's range.
    """
    low, high = (1, None) if policy.maximum is None else (policy.minimum, policy.maximum)
    advice = f"ask for {low} or more" if high is None else f"ask for {low} to {high}"
    if target == 0:
        what, advice = "A run cannot be scaled to 0 replicas: it would stand still", f"{advice}, or stop the run"
    elif target < 0:
        what = f"There cannot be {target} replicas"
    elif target < low:
        what = f"{target} is below the least number of replicas this run may have, {low}"
    elif high is not None and target > high:
        what = f"{target} is above the largest number of replicas this run may have, {high}"
    else:
        return
    raise ConfigError(what, where="replicas", advice=advice)


@dataclass(frozen=True, slots=True)
class NodeView:
    """A live machine: how many more replicas it could take, and whether it is about to be taken away."""

    node: str
    room: int
    draining: bool = False


class SlotPhase(Enum):
    """Where a replica is in its life. One that is leaving counts no more, whatever becomes of it."""

    STARTING = "starting"
    ACTIVE = "active"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Slot:
    """A replica whose end has not been told: where it is, its phase and since when; `settled`: it has proved itself."""

    node: str
    phase: SlotPhase
    since: float
    settled: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine on which replicas failed: how often in a row, and until when it is avoided (if not: the last time)."""

    strikes: int
    avoided_until: float


def doubled(first: float, times: int, longest: float) -> float:
    """`first` doubled so many times, at most `longest`."""
    return min(first * 2.0 ** min(times, 64), longest)


def struck(policy: Policy, machine: Machine | None, proved: bool, now: float) -> Machine:
    """The record of a machine after one more failure; the first one if the replica had proved itself."""
    strikes = 1 if proved or machine is None else machine.strikes + 1
    until = now if machine is None else max(now, machine.avoided_until)
    if strikes >= policy.node_strikes:
        delay = doubled(policy.node_delay, strikes - policy.node_strikes, policy.longest_node_delay)
        until = max(until, now + delay)
    return Machine(strikes, until)


def remembered(policy: Policy, machine: Machine, present: bool, now: float) -> bool:
    """Whether a record is kept: while it means something, and for a while after its machine has gone."""
    if now < machine.avoided_until:
        return True
    return machine.strikes > 0 and (present or now < machine.avoided_until + policy.longest_node_delay)


def rooms(nodes: Collection[NodeView], launched: Collection[tuple[str, float]]) -> dict[str, int]:
    """How many more replicas machines can take after what was launched, without those that drain or are full."""
    taken = Counter(node for node, _ in launched)
    return {n.node: n.room - taken[n.node] for n in nodes if not n.draining and n.room > taken[n.node]}


def choose(
    policy: Policy, machines: Mapping[str, Machine], free: Mapping[str, int], slots: Collection[Slot], now: float
) -> str | None:
    """The machine for the next replica, by most room, fewest of ours and name; None: there is none that may be used.

    Args:
        policy: of the run.
        machines: the records of those on which replicas failed.
        free: how many more replicas machines can take, those that have room (see `rooms`).
        slots: all replicas.
        now: the carrier's clock, seconds.
    """
    wanted = [slot for slot in slots if slot.phase is not SlotPhase.LEAVING]
    ours, allowed = Counter(slot.node for slot in slots), dict[str, int]()
    for node, room in free.items():
        machine = machines.get(node)
        if machine is None or (machine.strikes < policy.node_strikes and now >= machine.avoided_until):
            allowed[node] = room
        # One is tried where the avoidance has ended; others follow when it has proved itself.
        elif now >= machine.avoided_until and not _tried(machine, node, wanted):
            allowed[node] = 1
    if allowed:
        return min(allowed, key=lambda node: (-allowed[node], ours[node], node))
    # A run without any replica had rather try a bad machine than stand still.
    return min(free, key=lambda node: (machines[node].avoided_until, node)) if free and not wanted else None


def _tried(machine: Machine, node: str, wanted: Collection[Slot]) -> bool:
    return any(slot.node == node and slot.since >= machine.avoided_until for slot in wanted)
