"""A disk in memory that forgets what was not synced, for the real `zoray.ledger.Ledger` to write on."""

from __future__ import annotations

import errno
import functools
import os
import random
import tempfile
from pathlib import Path

from zoray.files import Files
from zoray.ledger import Ledger

FOLDER = Path("simulated-run")


class PowerCutError(BaseException):
    """The coordinator's machine is gone in the middle of a system call. No `except Exception` may survive it."""


@functools.cache
def empty_ledger() -> dict[str, bytes]:
    """The files of a ledger without commits, by name."""
    with tempfile.TemporaryDirectory() as folder:
        Ledger.create(folder, {"run": "simulated"}).close()
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


class Disk:
    """Files with the page cache's semantics: all see `cached`; a power cut leaves `durable` and a part of the rest.

    `fault_in` counts system calls down to a fault, which is "cut" (before the call), "torn" (after part of a write, or
    after the call) or "full" (an OSError); `faults` counts those there were.
    """

    def __init__(self, rng: random.Random, *, fsync_works: bool = True) -> None:
        self._rng, self._fsync_works = rng, fsync_works
        self.durable = dict(empty_ledger())
        self._cached = {name: bytearray(data) for name, data in self.durable.items()}
        self._unsynced: dict[str, list[tuple[int, bytes] | int]] = {name: [] for name in self.durable}
        self._open: dict[int, str] = {}
        self._next_fd = 3
        self.fault_in: int | None = None
        self.fault = "cut"
        self.faults = 0

    def files(self) -> Files:
        """The system calls of this disk. The ledger exists already, so there is nothing to rename."""
        return Files(
            open=self._open_file, size=lambda fd: len(self._cached[self._open[fd]]), read=self._read,
            write=self._write, truncate=self._truncate, fsync=self._fsync, close=lambda fd: self._open.pop(fd, None),
        )  # fmt: skip

    def power_cut(self) -> None:
        """Lose what was not synced, except for a random first part of it."""
        for name, operations in self._unsynced.items():
            data = bytearray(self.durable[name])
            kept = self._rng.randint(0, len(operations))
            for i, operation in enumerate(operations[:kept]):
                if isinstance(operation, int):
                    _resize(data, operation)
                    continue
                offset, content = operation
                if i == kept - 1:
                    content = content[: self._rng.randint(0, len(content))]
                    if self._rng.random() < 0.3 and name == "commits.bin":
                        # The length reached the disk, the content did not.
                        content = bytes(len(content))
                _put(data, offset, content)
            self.durable[name] = bytes(data)
            self._cached[name] = data
            operations.clear()
        self._open.clear()
        self.fault_in = None

    def _open_file(self, path: Path, flags: int) -> int:
        name, faulty = path.name, self._call()
        if path not in (FOLDER, FOLDER.parent) and name not in self._cached:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        self._next_fd += 1
        self._open[self._next_fd] = name
        if flags & os.O_TRUNC:
            _resize(self._cached[name], 0)
            self._unsynced[name].append(0)
        if faulty:
            raise PowerCutError
        return self._next_fd

    def _read(self, fd: int, count: int, offset: int) -> bytes:
        return bytes(self._cached[self._open[fd]][offset : offset + count])

    def _write(self, fd: int, data: bytes, offset: int) -> int:
        name, faulty = self._open[fd], self._call()
        taken = self._rng.randint(1, len(data)) if faulty or self._rng.random() < 0.1 else len(data)
        _put(self._cached[name], offset, data[:taken])
        self._unsynced[name].append((offset, data[:taken]))
        if faulty:
            raise PowerCutError
        return taken

    def _truncate(self, fd: int, size: int) -> None:
        name, faulty = self._open[fd], self._call()
        _resize(self._cached[name], size)
        self._unsynced[name].append(size)
        if faulty:
            raise PowerCutError

    def _fsync(self, fd: int) -> None:
        name, faulty = self._open[fd], self._call()
        if self._fsync_works and name in self._cached:
            self.durable[name] = bytes(self._cached[name])
            self._unsynced[name].clear()
        if faulty:
            raise PowerCutError

    def _call(self) -> bool:
        """Count a system call; True: the fault is due once its effect has taken place."""
        if self.fault_in is None:
            return False
        self.fault_in -= 1
        if self.fault_in > 0:
            return False
        self.fault_in = None
        self.faults += 1
        if self.fault == "cut":
            raise PowerCutError
        if self.fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return True


def _resize(data: bytearray, size: int) -> None:
    del data[size:]
    data.extend(bytes(size - len(data)))


def _put(data: bytearray, offset: int, content: bytes) -> None:
    _resize(data, max(len(data), offset))
    data[offset : offset + len(content)] = content
