"""How a replica gets into a run: it introduces itself, takes the newest snapshot there is, and replays what is missing.

Each part is a call to the replica, and its end begins the next one: the run goes on meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from actors.fleet import Fleet
from actors.inbox import Inbox, fault
from actors.replica import Introduction
from zoray.errors import ZorayError
from zoray.identity import header_digest
from zoray.ledger import Ledger
from zoray.snapshot import heads

if TYPE_CHECKING:
    from pathlib import Path

    from actors.journal import Journal

CHUNK = 512
"""Commits sent at a time."""

CLOSE = 2
"""A replica that lacks no more commits than this is ready: they come along with its first request."""


class Admission:
    """Brings new replicas to the step of the run.

    Args:
        fleet, inbox, journal: of the run.
        snapshots: folder of the run's snapshots.
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
        snapshots: Path,
        *,
        welcome: Callable[[str, Introduction], None],
        ready: Callable[[str, int], None],
        failed: Callable[[str, ZorayError], None],
    ) -> None:
        self._fleet, self._inbox, self._journal, self._snapshots = fleet, inbox, journal, snapshots
        self._welcome, self._ready, self._failed = welcome, ready, failed
        self._heard: set[str] = set()
        self.ledger: Ledger | None = None
        self.introductions: dict[str, Introduction] = {}

    def begin(self, name: str) -> None:
        """A replica's process was started."""
        self._then(name, self._introduced, "introduce")

    def _then(self, name: str, then: Callable[..., None], method: str, *arguments: object) -> None:
        def done(value: object, error: BaseException | None) -> None:
            if name not in self._fleet:
                return
            if error is not None:
                self._failed(name, fault(error, f"replica {name}"))
                return
            then(name, value)

        self._inbox.watch(self._fleet.call(name, method, *arguments), done)

    def _introduced(self, name: str, introduction: Introduction) -> None:
        try:
            self._welcome(name, introduction)
        except ZorayError as error:
            self._failed(name, error)
            return
        assert self.ledger is not None
        self.introductions[name] = introduction
        self._hear(introduction.warnings)
        agreed = {int(row["step"]): str(row["digest"]) for row in self._journal.folder.rows("digests")}
        known = heads(self._snapshots, self.ledger, agreed=agreed)
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
