"""The system calls a ledger is made of, one by one, so that tests can fail or stop between any two of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Files:
    """The system calls of a ledger: tests put others in their place, that fail, write less or stop between any two."""

    open: Callable[[Path, int], int] = lambda path, flags: os.open(path, flags, 0o644)
    size: Callable[[int], int] = lambda fd: os.fstat(fd).st_size
    read: Callable[[int, int, int], bytes] = os.pread
    write: Callable[[int, bytes, int], int] = os.pwrite
    truncate: Callable[[int, int], None] = os.ftruncate
    fsync: Callable[[int], None] = os.fsync
    rename: Callable[[Path, Path], None] = os.replace
    close: Callable[[int], None] = os.close


@contextmanager
def opened(files: Files, path: Path, flags: int) -> Iterator[int]:
    """A file descriptor for the time of the block."""
    fd = files.open(path, flags)
    try:
        yield fd
    finally:
        files.close(fd)


def write_all(files: Files, fd: int, data: bytes, offset: int) -> None:
    """Write everything at an offset, in as many calls as it takes.

    Raises:
        OSError: the disk refuses, or takes nothing.
    """
    while data:
        written = files.write(fd, data, offset)
        if written <= 0:
            raise OSError(errno.EIO, "the disk took none of the bytes")
        data, offset = data[written:], offset + written
