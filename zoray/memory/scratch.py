"""Folders for weights in files, on a disk of the machine: one per process, gone when the process is."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from zoray.errors import ResourceError

_PREFIX = "zoray-"
_HELD: list[int] = []
"""Locks of this process; the kernel lets go of them when it ends, however it ends."""


def claim(place: str, name: str) -> Path:
    """A new folder under `place` for this process; those of processes that have ended are deleted.

    Args:
        place: a folder on a disk of this machine; it is made if it is not there.
        name: what the folder's name should say.

    Raises:
        ResourceError: it cannot be made there.
    """
    try:
        Path(place).mkdir(parents=True, exist_ok=True)
        for old in Path(place).glob(f"{_PREFIX}*"):
            if (lock := _lock(old)) is not None:
                shutil.rmtree(old, ignore_errors=True)
                os.close(lock)
        made = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{name}-", dir=place))
        lock = _lock(made)
    except OSError as error:
        raise ResourceError(
            f"Weights cannot be kept in files there: {error}.",
            where="memory.nvme_path",
            advice="name a folder on a fast disk that every machine has and that replicas can write to",
        ) from error
    if lock is None:
        # Another process took it for one that was left behind, in the moment before it was locked.
        return claim(place, name)
    _HELD.append(lock)
    return made


def _lock(folder: Path) -> int | None:
    """Lock a folder; None if another process has, or it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    if not folder.exists():
        os.close(descriptor)
        return None
    return descriptor
