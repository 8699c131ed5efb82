"""Who runs what: handing items to idle replicas, taking them back, and when an answer is late."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from zoray.protocol.messages import Action, Assign, Cause, Item, Kind, Release, Warn
from zoray.protocol.state import Flight, State

RECENT = 31
"""Durations the median of a kind is taken over."""

WITNESSES = 2
"""Proven replicas whose digests a newcomer's is compared with."""


def assign(state: State, now: float, actions: list[Action]) -> None:
    """Give every idle replica an item while there is one. Where digests are compared, a replica's own comes first."""
    if state.comparing:
        for name in tuple(state.idle):
            if _asked(state, name):
                give(state, name, Item(Kind.DIGEST, state.step), now, actions)
    while state.idle and (item := _next_item(state)) is not None:
        give(state, next(iter(state.idle)), item, now, actions)


def _asked(state: State, name: str) -> bool:
    """Whether an idle replica has to give its digest now: to prove a newcomer, two witnesses are enough."""
    if name in state.digests:
        return False
    if state.thorough or not state.members[name].proven:
        return True
    giving = (other for other, m in state.members.items() if m.proven and m.item and m.item.kind is Kind.DIGEST)
    given = (other for other in state.digests if other in state.members and state.members[other].proven)
    return len({*giving, *given}) < WITNESSES


def _next_item(state: State) -> Item | None:
    while state.again:
        item, state.again = state.again[0], state.again[1:]
        if item not in state.results:
            return item
    while state.cursor < len(state.queue):
        item = state.queue[state.cursor]
        state.cursor += 1
        # The answer may have come from a request of the coordinator's previous life.
        if item not in state.results:
            return item
    return None


def give(state: State, name: str, item: Item, now: float, actions: list[Action]) -> None:
    """Assign `item` to the idle replica `name`, with the commits it is not known to hold."""
    member = state.members[name]
    del state.idle[name]
    state.members[name] = replace(member, item=item, since=now)
    if item.kind is not Kind.DIGEST:
        # Taken out first, so that flights stay in the order of time.
        before = state.flights.pop(item, None)
        state.flights[item] = Flight(now, (*before.holders, name) if before else (name,))
    actions.append(Assign(name, item, min(member.held, item.step)))


def unassign(state: State, item: Item, name: str) -> None:
    """`name` no longer runs `item`: unless another one does, it is given again."""
    flight = state.flights.get(item)
    if flight is None or name not in flight.holders:
        return
    holders = tuple(holder for holder in flight.holders if holder != name)
    if holders:
        state.flights[item] = replace(flight, holders=holders)
    else:
        del state.flights[item]
        state.again = (*state.again, item)


def free(state: State, name: str, actions: list[Action]) -> None:
    """`name` has nothing to run: it is idle, or leaves if it was asked to."""
    member = state.members[name]
    state.members[name] = replace(member, item=None)
    if member.draining:
        release(state, name, "drained", "it was asked to leave", actions)
    else:
        state.idle[name] = None


def drop(state: State, name: str) -> bool:
    """Forget a replica and give its item to another one; whether there was such a replica."""
    member = state.members.pop(name, None)
    if member is None:
        return False
    state.idle.pop(name, None)
    if member.item is not None:
        unassign(state, member.item, name)
    return True


def release(
    state: State,
    name: str,
    cause: Cause,
    reason: str,
    actions: list[Action],
) -> None:
    """Put a replica out of the run."""
    drop(state, name)
    actions.append(Release(name, reason, cause))
    if cause not in ("drained", "rewound"):
        actions.append(Warn(f"replica {name} is released: {reason}"))


def observe(state: State, kind: Kind, seconds: float) -> None:
    """Remember how long an item of this kind took, queueing and applying commits included."""
    state.durations[kind] = (*state.durations.get(kind, ())[-RECENT + 1 :], seconds)


def deadline(state: State, kind: Kind) -> float:
    """Seconds after which an item of this kind is late."""
    recent, settings = state.durations.get(kind), state.settings
    least = settings.snapshot_patience if kind is Kind.SNAPSHOT else 0.0
    if not recent:
        return max(settings.first_deadline, least)
    return max(settings.late_factor * median(recent), settings.late_minimum, least)
