"""The replicas of a study, from their start to their end; the kernel of membership decides which there are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ray.exceptions import RayTaskError

from actors.fleet import Fleet
from actors.inbox import Inbox, fault, first_line
from actors.roster import VIEW_LAG, members_of
from actors.tuning_replica import Entry, Order, TrialReplica
from zoray.config import RunConfig
from zoray.errors import ResourceError, ZorayError
from zoray.protocol.machines import NodeView
from zoray.protocol.membership import (
    Abandon,
    Announce,
    GiveUp,
    Launch,
    Leave,
    MembershipEvent,
    NodesSeen,
    Note,
    ReplicaGone,
    ReplicaJoined,
    SlotPhase,
    rebalance,
)
from zoray.tuning.messages import Value

PATIENCE, SLOWER = 60.0, 10.0
"""A share may take so many seconds, or so many times as long as the slowest that came to its end."""


class TrialFleet(Fleet):
    """A fleet of `TrialReplica`."""

    actor = TrialReplica


class Pool:
    """Starts replicas, sends them work, and replaces those that die.

    Args:
        config: of the study.
        embedded: Ray runs on this machine for this study alone.
        epsilons: of the trials.
        inbox: of the study, whose thread calls everything here.
        welcome: is shown each replica's entry, and raises a `ZorayError` if it does not belong to the study.
        ready: is told a replica that can be given work.
        lost: is told a replica that is no more.
        say: is told what a person should know.
    """

    def __init__(
        self,
        config: RunConfig,
        embedded: bool,
        epsilons: tuple[float, ...],
        inbox: Inbox,
        *,
        welcome: Callable[[str, Entry], None],
        ready: Callable[[str], None],
        lost: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        self.fleet = TrialFleet(config, "", embedded)
        self.members = members_of(config, embedded)
        self._epsilons, self._inbox = epsilons, inbox
        self._welcome, self._ready, self._lost, self._say = welcome, ready, lost, say
        self._patience, self._without = 0.0 if embedded else config.start_timeout, math.inf
        self._slowest: float | None = None
        self._since: dict[str, float] = {}
        self._closed = self._met = False

    def start(self) -> None:
        """Start the first replicas, and look at the machines from now on."""
        self._rebalance(NodesSeen(self.fleet.machines()))
        self.fleet.watch(self._look)

    @property
    def active(self) -> int:
        """Replicas at work."""
        return sum(slot.phase is SlotPhase.ACTIVE for slot in self.members.slots.values())

    def give(self, name: str, order: Order, then: Callable[[tuple[Value, ...] | ZorayError], None]) -> None:
        """Send a replica a share; `then` is told what came of it, unless the replica has died."""
        if name not in self.fleet:
            # It has ended in this very turn; the kernel will hear of it next.
            return
        self._since[name] = began = time.monotonic()

        def done(values: list[Any], error: BaseException | None) -> None:
            if name not in self.fleet:
                return
            del self._since[name]
            if error is None:
                self._slowest = max(self._slowest or 0.0, time.monotonic() - began)
                then(values[0])
            else:
                reason = fault(error, f"replica {name}")
                if isinstance(error, RayTaskError):
                    then(reason)
                self.gone(name, first_line(reason), failed=True)

        self._inbox.watch(self.fleet.call(name, "share", order), done)

    def gone(self, name: str, reason: str, failed: bool) -> None:
        """End a replica's process, if it has not ended; a failure counts against its machine."""
        if name not in self.fleet:
            return
        self.fleet.end(name)
        self._since.pop(name, None)
        self._say(f"replica {name} has gone: {reason}")
        self._lost(name)
        self._rebalance(ReplicaGone(name, reason, failed))

    def check(self) -> None:
        """End the replicas that hang in their work; and give up if there is no room for a single one.

        Raises:
            ResourceError: no machine has room.
        """
        now = time.monotonic()
        for name, since in list(self._since.items()):
            if self._slowest is not None and now - since > max(PATIENCE, SLOWER * self._slowest):
                self.gone(name, f"it hangs: {now - since:.0f} s of work that took {self._slowest:.0f} s", failed=True)
        self._without = math.inf if self.members.slots else min(self._without, now)
        if now - self._without > self._patience and now >= self.members.retry_at:
            raise self.fleet.shortage()

    def close(self) -> None:
        """End every replica, and ask the cluster for nothing more. Closing twice does nothing."""
        if not self._closed:
            self._closed = True
            self.fleet.close()
            self.fleet.announce(0)

    def _look(self, machines: tuple[NodeView, ...], config: RunConfig) -> None:
        self._inbox.put(partial(self._rebalance, NodesSeen(machines, time.monotonic() - VIEW_LAG)))

    def _rebalance(self, event: MembershipEvent) -> None:
        if self._closed:
            return
        self.members, actions = rebalance(self.members, event, time.monotonic())
        for action in actions:
            match action:
                case Launch(name, node):
                    self.fleet.start(name, node)
                    self._inbox.watch(self.fleet.call(name, "enter", self._epsilons), partial(self._entered, name))
                case Leave(name) | Abandon(name):
                    # Later: this is in the middle of another change of the members. What it runs is for others.
                    self._inbox.put(partial(self.gone, name, "its machine is about to be taken away", False))
                case Announce(count):
                    self.fleet.announce(count)
                case Note(text):
                    self._say(text)
                case GiveUp(text):
                    raise ResourceError(text, where="replicas", advice="look at the machines, then repeat the command")

    def _entered(self, name: str, entries: list[Entry], error: BaseException | None) -> None:
        if name not in self.fleet:
            return
        try:
            if error is not None:
                raise fault(error, f"replica {name}")
            self._welcome(name, entries[0])
        except ZorayError as reason:
            # What is wrong with the study itself ends it, as long as no replica belongs to it.
            if not self._met and not isinstance(reason, ResourceError):
                raise
            text = reason.what if reason.advice is None else f"{reason.what} ({reason.advice})"
            self.gone(name, f"it cannot join: {text}", failed=True)
            return
        self._met = True
        self._rebalance(ReplicaJoined(name))
        self._ready(name)
