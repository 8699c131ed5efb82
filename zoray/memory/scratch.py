"""Folders for weights in files, on a disk of the machine: one per process, gone when the process is."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from zoray.errors import ConfigError

_HELD: list[int] = []
"""Locks of this process; the kernel lets go of them when it ends, however it ends."""


def claim(place: str, name: str) -> Path:
    """A new folder under `place` for this process; those of processes that have ended are deleted.

    All of them lie in one folder of the user's that nothing else is in.

    Args:
        place: a folder on a disk of this machine; it is made if it is not there.
        name: what the folder's name should say.

    Raises:
        ConfigError: it cannot be made there.
    """
    mine = Path(place).expanduser() / f".zoray-{os.getuid()}"
    try:
        mine.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in mine.iterdir():
            if (lock := _lock(old)) is not None:
                shutil.rmtree(old, ignore_errors=True)
                os.close(lock)
        while True:
            made = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=mine))
            if (lock := _lock(made)) is not None:
                _HELD.append(lock)
                return made
            # Another process took it for one that was left behind, in the moment before it was locked.
    except OSError as error:
        raise ConfigError(
            f"Weights cannot be kept in files there: {error}.",
            where=f"memory.nvme_path, on {os.uname().nodename}",
            advice="name a folder on a fast disk that every machine has and that replicas can write to",
        ) from error


def _lock(folder: Path) -> int | None:
    """Lock a folder; None if another process has, or it is gone, or it is no folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    if not folder.exists():
        os.close(descriptor)
        return None
    return descriptor
