"""How a replica gets into a run: it introduces itself, takes the newest snapshot there is, and replays what is missing.

Each part is a call to the replica, and its end begins the next one: the run goes on meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from actors.fleet import Fleet
from actors.inbox import Inbox, fault
from actors.replica import Introduction
from zoray.errors import ResourceError, ZorayError
from zoray.identity import header_digest
from zoray.ledger import Ledger
from zoray.snapshot import usable

if TYPE_CHECKING:
    from actors.journal import Journal

CHUNK = 512
"""Commits sent at a time."""

CLOSE = 2
"""A replica that lacks no more commits than this is ready: they come along with its first request."""

PROCESS = 300.0
"""Seconds within which a replica's process must be there: its machine may have given the room to other work."""

PATIENCE, SLOWER = 120.0, 10.0
"""Any later part of joining may take so many seconds, or so many times as long as the slowest that came to its end."""

_APPEAR, _INTRODUCE = "__ray_ready__", "introduce"


class Admission:
    """Brings new replicas to the step of the run.

    Args:
        fleet, inbox, journal: of the run.
        patience: seconds that parts of joining are given at least, by method, where that is not `PATIENCE`.
        welcome: is shown each introduction, and raises a `ZorayError` if that replica does not belong to the run; once
            it has returned, `ledger` must be set.
        ready: is told the replica and the step of its weights.
        failed: is told what was wrong with a replica.
    """

    def __init__(
        self,
        fleet: Fleet,
        inbox: Inbox,
        journal: Journal,
        *,
        patience: Mapping[str, float] | None = None,
        welcome: Callable[[str, Introduction], None],
        ready: Callable[[str, int], None],
        failed: Callable[[str, ZorayError], None],
    ) -> None:
        self._fleet, self._inbox, self._journal, self._patience = fleet, inbox, journal, patience or {}
        self._welcome, self._ready, self._failed = welcome, ready, failed
        self._heard: set[str] = set()
        self._waiting: dict[str, tuple[str, float]] = {}
        # By method and processes of the replica: what a resident one does is no measure for a sharded one.
        self._slowest: dict[tuple[str, int], float] = {}
        self.ledger: Ledger | None = None
        self.introductions: dict[str, Introduction] = {}

    def begin(self, name: str) -> None:
        """A replica's process was started."""
        self._then(name, self._appeared, _APPEAR)

    def check(self) -> None:
        """Give up the replicas that hang in some part of joining; how long that may take is not known of the first."""
        now = time.monotonic()
        for name, (method, since) in list(self._waiting.items()):
            if name not in self._fleet:
                del self._waiting[name]
                continue
            slowest = self._slowest.get((method, self._fleet.width(name)))
            least = self._patience.get(method, PATIENCE)
            patience = max(least, SLOWER * slowest) if slowest is not None else float("inf")
            if now - since > (PROCESS if method == _APPEAR else patience):
                del self._waiting[name]
                self._failed(name, _hangs(name, method, now - since, slowest or 0.0))

    def _then(self, name: str, then: Callable[..., None], method: str, *arguments: object) -> None:
        began = time.monotonic()
        self._waiting[name] = method, began

        def done(values: list[object], error: BaseException | None) -> None:
            if name not in self._fleet:
                return
            del self._waiting[name]
            if error is None:
                key = method, self._fleet.width(name)
                self._slowest[key] = max(self._slowest.get(key, 0.0), time.monotonic() - began)
            if error is not None:
                self._failed(name, fault(error, f"replica {name}"))
                return
            if method in ("join", "catch_up") and any(value != values[0] for value in values):
                at = ", ".join(str(value[0] if isinstance(value, tuple) else value) for value in values)
                self._failed(name, ResourceError(f"The processes of replica {name} are at different steps: {at}."))
                return
            then(name, values if method == _INTRODUCE else values[0])

        call = self._fleet.introduce(name) if method == _INTRODUCE else self._fleet.call(name, method, *arguments)
        self._inbox.watch(call, done)

    def _appeared(self, name: str, _: object) -> None:
        self._then(name, self._introduced, _INTRODUCE)

    def _introduced(self, name: str, introductions: list[Introduction]) -> None:
        introduction = replace(introductions[0], pids=tuple(each.pid for each in introductions))
        try:
            self._welcome(name, introduction)
        except ZorayError as error:
            self._failed(name, error)
            return
        assert self.ledger is not None
        self.introductions[name] = introduction
        self._hear(introduction.warnings)
        self._then(name, self._looked, "find_snapshots")

    def _looked(self, name: str, looked: tuple[dict[int, str | None], tuple[str, ...]]) -> None:
        assert self.ledger is not None
        found, warnings = looked
        self._hear(warnings)
        agreed = {int(row["step"]): str(row["digest"]) for row in self._journal.folder.rows("digests")}
        known = usable(found, self.ledger, agreed=agreed)
        run = header_digest(self.ledger.header)
        self._then(name, self._joined, "join", self.ledger.genesis, run, known)

    def _joined(self, name: str, joined: tuple[int, tuple[str, ...]]) -> None:
        step, warnings = joined
        self._hear(warnings)
        self._advance(name, step)

    def _advance(self, name: str, step: int) -> None:
        """The replica holds the weights at `step`: send it the next commits, until it lacks hardly any."""
        assert self.ledger is not None
        head = self.ledger.next_step
        if head - step <= CLOSE:
            self._ready(name, step)
            return
        records = self.ledger.records(step, min(head, step + CHUNK))
        self._journal.exchanged(sent=len(records))
        self._then(name, self._advance, "catch_up", records)

    def _hear(self, warnings: tuple[str, ...]) -> None:
        """Every replica has the same to say of the model and the data: once is enough."""
        for text in warnings:
            if text not in self._heard:
                self._heard.add(text)
                self._journal.warn(text)


def _hangs(name: str, method: str, seconds: float, slowest: float | None) -> ResourceError:
    if method == _APPEAR:
        what = f"replica {name} has no process after {seconds:.0f} s"
        return ResourceError(what, advice="its machine has no room for it after all, or cannot start it")
    parts = {"introduce": "loading the model and the data", "find_snapshots": "looking for snapshots"}
    part = {**parts, "join": "loading a snapshot"}.get(method, "replaying commits")
    what = f"replica {name} hangs: {seconds:.0f} s of {part}, which took others {slowest:.0f} s at most"
    return ResourceError(what, advice="look at its machine and at the storage it reads from")
