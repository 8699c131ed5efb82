"""A tracker in a thread of its own."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from queue import Full, Queue

from actors.trackers.base import Tracker

_WAITING = 1000
"""Calls that may wait for a tracker before it is given up."""

Call = Callable[[Tracker], None]


class Feed:
    """Passes calls on to a tracker, which may be slow, hang or fail.

    Args:
        name: of the tracker.
        make: opens it; done in the thread too.
        waiting: calls that may wait for it.

    Attributes:
        fault: why it gets no more calls; None while it does.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], waiting: int = _WAITING) -> None:
        self.name = name
        self.fault: str | None = None
        self._make = make
        self._calls: Queue[Call | None] = Queue(waiting)
        # A daemon: a process that is told to end must not wait for one that hangs.
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker-{name}")
        self._thread.start()

    def put(self, call: Call) -> None:
        """Let the tracker be told something, some time."""
        if self.fault is not None:
            return
        try:
            self._calls.put_nowait(call)
        except Full:
            self.fault = f"{self._calls.maxsize} reports wait for it"

    def close(self, last: Call, patience: float) -> None:
        """Pass on what waits and one last call, and end the thread; not longer than `patience` seconds."""
        self.put(last)
        if self.fault is not None:
            return
        try:
            self._calls.put(None, timeout=patience)
        except Full:
            self.fault = "it does not take its last reports"
            return
        self._thread.join(patience)
        if self._thread.is_alive() and self.fault is None:
            self.fault = f"it has not taken its last reports within {patience:g} s"

    def _work(self) -> None:
        try:
            tracker = self._make()
            while (call := self._calls.get()) is not None:
                call(tracker)
        except BaseException as error:
            # Even SystemExit, by which some libraries say that they cannot go on.
            # An address may have a password in it.
            text = re.sub(r"://[^/\s@]+@", "://", str(error)).strip().splitlines()
            self.fault = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
