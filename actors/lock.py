"""The lock of a run: two coordinators never write one ledger.

`<run>/lock` is locked with flock for the coordinator's life. The kernel frees it with the process, however that ends:
a crash never stands in the way of a resume on the same machine. For volumes on which flock does not reach other
machines, the file's content (JSON: host, pid, since, run) says who has the run, and its mtime, which a thread renews,
is the last sign of life. The file is emptied and never deleted: whoever holds a deleted file keeps nobody out.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from zoray.errors import RunError

STALE_AFTER = 30.0

_Flock = Literal["taken", "held", "unsupported"]
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def file_system_clock(folder: Path) -> float:
    """The time, in seconds since 1970, by whoever stamps the files of `folder`: on a shared volume not this machine."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".lock-") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        # Who may only read there has to do with this machine's.
        return time.time()


class RunLock:
    """The right to write one run; a context manager, which takes it unless `acquire` has, and releases it.

    Args:
        folder: of the run.
        interval: seconds between two signs of life.
        stale_after: seconds without one after which another machine may have the run.
        clock: the time by the file system of a folder, in seconds.

    Attributes:
        path: the file, `<run>/lock`.
        lost: another machine was seen to have taken the run, or the file is gone: stop writing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        interval: float = 5.0,
        stale_after: float = STALE_AFTER,
        clock: Callable[[Path], float] = file_system_clock,
    ) -> None:
        self.path, self.lost = folder.absolute() / "lock", False
        self._interval, self._stale_after, self._clock = interval, stale_after, clock
        self._fd, self._claim = -1, b""
        self._guard, self._released = threading.Lock(), threading.Event()

    def acquire(self, break_lock: bool = False) -> RunLock:
        """Take the run, or refuse at once; gives signs of life from then on, and returns itself.

        Args:
            break_lock: take it even from a machine that gave a sign of life a moment ago. A process that holds the
                flock is alive for certain: it is never overridden.

        Raises:
            RunError: another process has the run, or may have it on another machine, or the file cannot be written.
        """
        fd = -1
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            flock, owner = _lock(fd), _owner(fd)
            if not os.path.samestat(os.fstat(fd), os.stat(self.path)):
                raise OSError(errno.ESTALE, "its folder was replaced at this moment")
            if flock == "held":
                raise self._refusal(owner or _named({}), None, break_lock)
            if owner and not break_lock and not _dead(owner, flock):
                silence = _silence(fd, self._clock(self.path.parent))
                if silence < self._stale_after:
                    raise self._refusal(owner, silence, break_lock)
            self._claim = self._sign(fd)
        except BaseException as error:
            if fd >= 0:
                os.close(fd)
            if isinstance(error, OSError):
                raise RunError(
                    f"The run {self.path.parent.name} cannot be locked: {error.strerror or error}.",
                    where=str(self.path),
                    advice="check that its folder is there, that you may write to it, and the free space",
                ) from error
            raise
        self._fd, self.lost, self._released = fd, False, threading.Event()
        threading.Thread(target=self._live, args=(self._released,), daemon=True, name="lock").start()
        return self

    def beat(self) -> bool:
        """Give a sign of life; False, and `lost` from then on, if the run is no longer this lock's to write."""
        with self._guard:
            if self._fd < 0:
                return False
            try:
                # By name: NFS shows what others wrote in a file that is opened anew, and a deleted file has no name.
                self.lost = self.lost or self.path.read_bytes() != self._claim
                if not self.lost:
                    os.utime(self._fd)
            except FileNotFoundError:
                self.lost = True
            except OSError:
                # A volume that is away may come back; if it does not, the ledger will say so.
                pass
            return not self.lost

    def release(self) -> None:
        """Give the run back. Releasing twice does nothing."""
        with self._guard:
            fd, self._fd = self._fd, -1
            if fd < 0:
                return
            self._released.set()
            with suppress(OSError):
                if self.path.read_bytes() == self._claim:
                    os.ftruncate(fd, 0)
            with suppress(OSError):
                # Closing alone would leave it to a child that was forked meanwhile.
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def __enter__(self) -> RunLock:
        return self if self._fd >= 0 else self.acquire()

    def __exit__(self, *raised: object) -> None:
        self.release()

    def _live(self, released: threading.Event) -> None:
        while not released.wait(self._interval) and self.beat():
            pass

    def _sign(self, fd: int) -> bytes:
        since = datetime.fromtimestamp(self._clock(self.path.parent), timezone.utc).isoformat(timespec="seconds")
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "run": self.path.parent.name}
        claim = json.dumps(owner).encode()
        # In this order the file is never empty, which would mean free; synced, for other machines to see it.
        os.pwrite(fd, claim, 0)
        os.ftruncate(fd, len(claim))
        os.fsync(fd)
        return claim

    def _refusal(self, owner: dict[str, Any], silence: float | None, break_lock: bool) -> RunError:
        run, pid, host = self.path.parent.name, owner["pid"], owner["host"]
        if silence is None:
            what = f"The run {run} is being written by process {pid} on {host}, since {owner['since']}."
            advice = f"stop it with `zoray stop {run}`; if that process hangs, end it: pid {pid} on host {host}"
            advice += "; `--break-lock` is not for a process that is alive" if break_lock else ""
        else:
            what = f"The run {run} may still be written by process {pid} on {host}:"
            what += f" its last sign of life was {int(silence)} s ago."
            advice = f"wait: after {self._stale_after:g} s without one it can be resumed; at once with `--break-lock`,"
            advice += " if that machine is known to be gone"
        return RunError(what, where=str(self.path), advice=advice)


def held_by(
    folder: Path, *, stale_after: float = STALE_AFTER, clock: Callable[[Path], float] = file_system_clock
) -> dict[str, Any] | None:
    """Who has the run of a folder now (host, pid, since, run); None if nobody, or if its lock cannot be read."""
    with suppress(OSError):
        fd = os.open(folder / "lock", os.O_RDONLY)
        try:
            if owner := _owner(fd):
                flock = _flock(fd, fcntl.LOCK_SH)
                alive = flock == "held" or (not _dead(owner, flock) and _silence(fd, clock(folder)) < stale_after)
                return owner if alive else None
        finally:
            os.close(fd)
    return None


def _dead(owner: dict[str, Any], flock: _Flock) -> bool:
    # Here the kernel would still hold its flock for it.
    return flock == "taken" and owner["host"] == socket.gethostname()


def _silence(fd: int, now: float) -> float:
    return max(0.0, now - os.fstat(fd).st_mtime)


def _lock(fd: int) -> _Flock:
    # `held_by` holds it shared for an instant, and must not pass for a writer: then it could be had shared.
    for _ in range(1000):
        if (flock := _flock(fd, fcntl.LOCK_EX)) != "held" or _flock(fd, fcntl.LOCK_SH) == "held":
            return flock
    return "held"


def _flock(fd: int, kind: int) -> _Flock:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return "unsupported"
        raise
    return "taken"


def _owner(fd: int) -> dict[str, Any] | None:
    """What the file says; None if nothing. What cannot be understood may be another machine's, half written."""
    if not (content := os.pread(fd, 1 << 16, 0)):
        return None
    try:
        owner = json.loads(content)
    except ValueError:
        owner = None
    return _named(owner if isinstance(owner, dict) else {})


def _named(owner: dict[str, Any]) -> dict[str, Any]:
    return {key: owner.get(key, "unknown") for key in ("host", "pid", "since", "run")}
