"""The roster: which replicas there are. The kernel of membership decides, this carries out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from actors.admission import Admission
from actors.fleet import Fleet
from actors.inbox import Inbox
from actors.journal import Journal
from actors.replica import Introduction
from actors.settings import STORE_PATIENCE
from zoray.config import RunConfig
from zoray.errors import ResourceError, ZorayError
from zoray.protocol import Event, RemoveReplica, ReplicaReady
from zoray.protocol.machines import NodeView, Policy
from zoray.protocol.membership import (
    Abandon,
    Announce,
    GiveUp,
    Launch,
    Leave,
    Membership,
    MembershipEvent,
    NodesSeen,
    Note,
    ReplicaGone,
    ReplicaJoined,
    ScaleRequested,
    SlotPhase,
    check_target,
    initial_membership,
    rebalance,
)
from zoray.runs import RunFolder
from zoray.stores import is_uri

_TICK = 0.1
VIEW_LAG = 2.0
_SETTLED = 10.0
"""Seconds of work after which the death of a replica is an accident, and no sign that it cannot work at all."""
_ATTEMPTS = 10
"""Failures in a row, with no replica left, after which a run ends: about three minutes of trying."""
_PATIENCE = 15.0
"""Seconds the first replicas wait for others that were started with them."""


def _patience(config: RunConfig) -> dict[str, float]:
    """What each part of joining is given that has to do with an object store."""
    inputs = (config.model, config.task.train, config.task.eval or "")
    reading = {"introduce": STORE_PATIENCE} if any(map(is_uri, inputs)) else {}
    if not is_uri(config.snapshot_dir or ""):
        return reading
    return {**reading, "find_snapshots": STORE_PATIENCE, "join": STORE_PATIENCE}


def members_of(config: RunConfig, embedded: bool) -> Membership:
    """The membership of a run that has no replica yet."""
    minimum, maximum, wanted = config.replica_limits
    if embedded and maximum is not None:
        wanted = max(minimum, min(maximum, (os.cpu_count() or 1) // int(config.needs["CPU"])))
    # Where there is only one machine, there is no other to prefer.
    avoided = {"node_strikes": 1 << 30} if embedded else {}
    policy = Policy(minimum, maximum, settled_after=_SETTLED, hopeless_after=_ATTEMPTS, **avoided)
    return initial_membership(policy, wanted)


class Roster:
    """The replicas of a run, from their start to their end.

    Args:
        config, folder, inbox, journal: of the run.
        embedded: Ray runs on this machine for this run alone.
        welcome: see `Admission`.
        tell: is told what the other kernel has to know.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        inbox: Inbox,
        journal: Journal,
        embedded: bool,
        welcome: Callable[[str, Introduction], None],
        tell: Callable[[Event], None],
    ) -> None:
        self.fleet = Fleet(config, folder.snapshots_of(config), embedded)
        self.admission = Admission(
            self.fleet,
            inbox,
            journal,
            patience=_patience(config),
            welcome=welcome,
            ready=self._ready,
            failed=self._failed,
        )
        self.members = members_of(config, embedded)
        self.hopeless: str | None = None
        self._closed = False
        self._patience = 0.0 if embedded else config.start_timeout
        self._inbox, self._journal, self._tell = inbox, journal, tell
        self._weighing: set[str] = set()

    def gather(self) -> None:
        """Wait for the first replicas: for the run's minimum, and not long for others that are starting with them.

        Raises:
            ResourceError: no machine has room, or replicas die again and again while they start.
            ZorayError: what a replica found wrong with the model, the data or the configuration.
        """
        started, enough = time.monotonic(), None
        self._rebalance(NodesSeen(self.fleet.machines()))
        self.fleet.watch(self._look)
        while True:
            starting, active, now = self.count(SlotPhase.STARTING), self.count(SlotPhase.ACTIVE), time.monotonic()
            if self.hopeless is not None:
                raise ResourceError(self.hopeless, where=str(self._journal.folder.log))
            if active >= self.members.policy.minimum:
                enough = enough or now
                if not starting or now - enough > _PATIENCE:
                    return
            elif not starting and now - started > self._patience and now >= self.members.retry_at:
                raise self._too_few(active)
            self._inbox.turn(_TICK)

    def _too_few(self, active: int) -> ResourceError:
        if not active:
            return self.fleet.shortage()
        minimum = self.members.policy.minimum
        return ResourceError(
            f"There is room for {active} of the {minimum} replicas that the run needs at least.",
            where="replicas.min",
            advice="add machines, or give a smaller min: the result is the same",
        )

    def count(self, phase: SlotPhase) -> int:
        """Replicas in a phase."""
        return sum(slot.phase is phase for slot in self.members.slots.values())

    def scale(self, target: int, config: RunConfig | None = None) -> None:
        """Change how many replicas there should be; may be called from any thread.

        Args:
            target: in all.
            config: of those that are started from now on; None: as it was.

        Raises:
            ConfigError: the number is below the run's minimum or above its maximum.
        """
        check_target(self.members.policy, target)
        if config is not None:
            self._inbox.put(partial(self._hold, config))
        self._inbox.put(partial(self._rebalance, ScaleRequested(target)))

    def _hold(self, config: RunConfig) -> None:
        """Start replicas with another memory from now on, once it is seen what room the machines have for them."""
        self.fleet.hold(config)
        self._rebalance(NodesSeen((), time.monotonic() - VIEW_LAG))

    def gone(self, name: str, reason: str, fault: bool) -> None:
        """End a replica's process, if it has not ended; a fault counts against its machine."""
        self.fleet.end(name)
        self._rebalance(ReplicaGone(name, reason, fault))

    def weigh(self) -> None:
        """Ask the replicas at work how much memory they take; the answers go to the metrics."""
        for name, slot in self.members.slots.items():
            if slot.phase is SlotPhase.ACTIVE and name in self.fleet and name not in self._weighing:
                self._weighing.add(name)
                self._inbox.watch(self.fleet.call(name, "memory"), partial(self._weighed, name))

    def _weighed(self, name: str, memories: list[dict[str, int]], error: BaseException | None) -> None:
        self._weighing.discard(name)
        if error is None and name in self.fleet:
            total = {kind: sum(each[kind] for each in memories) for kind in memories[0]}
            self._journal.exporter.weighed(name, total)

    def restart_newcomers(self, reason: str) -> None:
        """Begin anew with the replicas that are not ready yet."""
        for name, slot in list(self.members.slots.items()):
            if slot.phase is SlotPhase.STARTING:
                self.gone(name, reason, fault=False)

    def close(self) -> None:
        """End every replica, and ask the cluster for nothing more. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        self.fleet.close()
        self.fleet.announce(0)

    def _look(self, machines: tuple[NodeView, ...], config: RunConfig) -> None:
        # What was started a moment ago may not be in Ray's view of a machine's free resources yet.
        seen = NodesSeen(machines, time.monotonic() - VIEW_LAG)
        self._inbox.put(partial(self._seen, seen, config))
        self._inbox.put(self.admission.check)

    def _seen(self, seen: NodesSeen, config: RunConfig) -> None:
        # Room for replicas as they were held before says nothing of those to come.
        if config is self.fleet.config:
            self._rebalance(seen)

    def _rebalance(self, event: MembershipEvent) -> None:
        before = self.members
        self.members, actions = rebalance(before, event, time.monotonic())
        if isinstance(event, ReplicaJoined) and event.name in before.slots:
            self._journal.exporter.changed("joined")
        elif isinstance(event, ReplicaGone) and event.name in before.slots:
            self._journal.exporter.changed("lost" if event.fault else "left")
        for action in actions:
            self._carry_out(action)

    def _carry_out(self, action: Any) -> None:
        match action:
            case Launch(name, node):
                self.fleet.start(name, node)
                self._journal.exporter.changed("started")
                self.admission.begin(name)
            case Leave(name):
                self._tell(RemoveReplica(name))
            case Abandon(name):
                self.fleet.end(name)
                # Later: this is in the middle of another change of the members.
                self._inbox.put(partial(self._rebalance, ReplicaGone(name, "it is not needed any more", False)))
            case Announce(count):
                self.fleet.announce(count)
            case Note(text):
                self._journal.say(text)
            case GiveUp(text):
                self.hopeless = text

    def _ready(self, name: str, step: int) -> None:
        self._journal.say(f"replica {name} joins with the weights of step {step}")
        self._tell(ReplicaReady(name, step, self.fleet.width(name)))
        self._rebalance(ReplicaJoined(name))

    def _failed(self, name: str, error: ZorayError) -> None:
        """A replica could not join. What is wrong with the run itself ends it, as long as no replica belongs to it."""
        if self.admission.ledger is None and not isinstance(error, ResourceError):
            raise error
        text = error.what if error.advice is None else f"{error.what} ({error.advice})"
        self._journal.warn(f"replica {name} cannot join: {text}")
        self.gone(name, text, fault=True)
