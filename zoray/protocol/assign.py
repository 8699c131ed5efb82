"""Who runs what: handing items to idle replicas, taking them back, and when an answer is late."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median

from zoray.protocol.messages import Action, Assign, Cause, Item, Kind, Release, Warn
from zoray.protocol.state import Flight, State

RECENT = 31
"""Durations the median of a kind is taken over."""

_LAST, _SLOW = 0.2, 1.5
"""How long the last probes of a step may take to be in line, of `short_probe`; how slow whoever has one, of usual."""

WITNESSES = 2
"""Proven replicas whose digests a newcomer's is compared with."""


def assign(state: State, now: float, actions: list[Action]) -> None:
    """Give every idle replica an item while there is one. Where digests are compared, a replica's own comes first.

    Where probes are so short that a round trip counts, the next one is sent before the last one's answer is there.
    """
    if state.comparing:
        for name in tuple(state.idle):
            if _asked(state, name):
                give(state, name, (Item(Kind.DIGEST, state.step),), now, actions)
    while state.idle:
        name = next(iter(state.idle))
        if not (items := _next_items(state, state.members[name].width)):
            break
        give(state, name, items, now, actions)
    while state.single and _worth_a_line(state):
        _line_up(state, next(iter(state.single)), now, actions)


def _left(state: State) -> int:
    return len(state.queue) - state.cursor


def _usual(state: State) -> float:
    """Seconds a probe usually takes; infinitely many while nothing is known."""
    return median(_probing(state) or (math.inf,))


def _probing(state: State) -> tuple[float, ...]:
    """How long probes took, or the evaluations that make them, which are all alike."""
    return tuple(seconds for kind in Kind if kind.probing for seconds in state.durations.get(kind, ()))


def _worth_a_line(state: State) -> bool:
    """Whether the next item is a probe that had better be in line behind another than wait for an idle replica."""
    left, short = _left(state), state.settings.short_probe
    if not left or state.again or state.comparing or not state.queue[state.cursor].kind.probing:
        return False
    # The last ones of a step may stand in line while other replicas are idle: they must be shorter still.
    return _usual(state) < (short if left > len(state.members) else _LAST * short)


def _line_up(state: State, name: str, now: float, actions: list[Action]) -> None:
    """Let a replica that runs a probe of this step have another one in line; it gets the commits with the first."""
    del state.single[name]
    member = state.members[name]
    # Of one that has answered nothing yet, nobody knows; it is in no line either.
    slow = member.took > _SLOW * _usual(state)
    fit = member.item is not None and member.item.step == state.step and not member.draining and not member.misses
    if slow or not fit or (item := _next_item(state)) is None:
        return
    state.members[name] = replace(member, ahead=item)
    state.flights[item] = Flight(now, (name,))
    actions.append(Assign(name, item, item.step))


def _asked(state: State, name: str) -> bool:
    """Whether an idle replica has to give its digest now: to prove a newcomer, two witnesses are enough."""
    if name in state.digests:
        return False
    if state.thorough or not state.members[name].proven:
        return True
    giving = (other for other, m in state.members.items() if m.proven and m.item and m.item.kind is Kind.DIGEST)
    given = (other for other in state.digests if other in state.members and state.members[other].proven)
    return len({*giving, *given}) < WITNESSES


def _next_items(state: State, width: int) -> tuple[Item, ...]:
    """What is given next to a replica of that width."""
    first = _next_item(state)
    items = [first] if first is not None else []
    while first is not None and len(items) < width and (item := _next_item(state, first)) is not None:
        items.append(item)
    return tuple(items)


def _next_item(state: State, beside: Item | None = None) -> Item | None:
    """The next item to be given, if there is one (that may be run at the same time as `beside`)."""
    while state.again:
        if beside is not None and not together(beside, state.again[0]):
            return None
        item, state.again = state.again[0], state.again[1:]
        if item not in state.results:
            return item
    while state.cursor < len(state.queue):
        item = state.queue[state.cursor]
        if beside is not None and not together(beside, item):
            return None
        state.cursor += 1
        # The answer may have come from a request of the coordinator's previous life.
        if item not in state.results:
            return item
    return None


def together(one: Item, other: Item) -> bool:
    """Whether one replica may run both at the same time: its processes gather each other's weights as they go along.

    So they must take the same number of forwards, and a whole probe may take two.
    """
    if Kind.PROBE in (one.kind, other.kind):
        return one.kind is other.kind
    return (one.kind.probing and other.kind.probing) or one.kind is other.kind is Kind.EVAL


def give(state: State, name: str, items: tuple[Item, ...], now: float, actions: list[Action]) -> None:
    """Assign `items` to the idle replica `name`, with the commits it is not known to hold."""
    member = state.members[name]
    del state.idle[name]
    state.members[name] = replace(member, items=items, since=now)
    if items[0].kind.probing and member.width == 1:
        state.single[name] = None
    for item in items if items[0].kind is not Kind.DIGEST else ():
        # Taken out first, so that flights stay in the order of time.
        before = state.flights.pop(item, None)
        state.flights[item] = Flight(now, (*before.holders, name) if before else (name,))
    actions.append(Assign(name, items[0], min(member.held, items[0].step), items[1:]))


def give_late(state: State, late: list[Item], now: float, actions: list[Action]) -> None:
    """Let idle replicas run what others were given and are late with, those that are late longest first."""
    while late and state.idle:
        name = next(iter(state.idle))
        items = [late.pop(0)]
        while late and len(items) < state.members[name].width and together(items[0], late[0]):
            items.append(late.pop(0))
        for _ in items:
            state.count("late")
        give(state, name, tuple(items), now, actions)


def take_back(state: State, name: str) -> None:
    """`name` no longer runs its items, nor the one it has in line."""
    member = state.members[name]
    for item in (*member.items, member.ahead):
        unassign(state, item, name)


def unassign(state: State, item: Item | None, name: str) -> None:
    """`name` no longer runs `item`, if there is one: unless another one does, it is given again."""
    flight = state.flights.get(item) if item is not None else None
    if item is None or flight is None or name not in flight.holders:
        return
    holders = tuple(holder for holder in flight.holders if holder != name)
    if holders:
        state.flights[item] = replace(flight, holders=holders)
    else:
        del state.flights[item]
        state.again = (*state.again, item)


def proceed(state: State, name: str, now: float, actions: list[Action]) -> None:
    """`name` has done what it ran: now it runs what it has in line, or is free."""
    member = state.members[name]
    if member.ahead is None:
        free(state, name, actions)
        return
    state.members[name] = replace(member, items=(member.ahead,), ahead=None, since=now)
    state.single[name] = None
    if (flight := state.flights.pop(member.ahead, None)) is not None:
        # It is late when it takes long, not when it had to wait.
        state.flights[member.ahead] = replace(flight, since=now)


def free(state: State, name: str, actions: list[Action]) -> None:
    """`name` has nothing to run: it is idle, or leaves if it was asked to."""
    member = state.members[name]
    state.members[name] = replace(member, items=(), ahead=None)
    state.single.pop(name, None)
    if member.draining:
        release(state, name, "drained", "it was asked to leave", actions)
    else:
        state.idle[name] = None


def drop(state: State, name: str) -> bool:
    """Forget a replica and give what it had to others; whether there was such a replica."""
    if name not in state.members:
        return False
    take_back(state, name)
    for names in (state.members, state.idle, state.single):
        names.pop(name, None)
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
    """Remember how long an item of this kind took, queueing and applying commits included.

    A probe that found done what others must do themselves says nothing of how long those may take.
    """
    known = state.durations.get(kind, ())
    if state.settings.by_batch and kind.probing and known and 2 * seconds < max(known):
        return
    state.durations[kind] = (*known[-RECENT + 1 :], seconds)


def deadline(state: State, kind: Kind) -> float:
    """Seconds after which an item of this kind is late."""
    recent, settings = state.durations.get(kind) or (_probing(state) if kind.probing else ()), state.settings
    least = settings.snapshot_patience if kind is Kind.SNAPSHOT else 0.0
    if not recent:
        return max(settings.first_deadline, least)
    return max(settings.late_factor * median(recent), settings.late_minimum, least)
