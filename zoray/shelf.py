"""Where the snapshots of a run lie, each a few files under a name: in a folder, or on an object store.

Whoever looks finds a whole snapshot or none. In a folder it is written beside its place and renamed into it; a store
cannot rename, so there the file that makes it whole goes last, and what lacks that file does not exist.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from zoray import stores

MARK = "snapshot.json"
"""The file that makes a snapshot whole."""

_SNAPSHOT = re.compile(r"step-\d+")


class Shelf(ABC):
    """A place for snapshots. Whatever cannot be done raises an OSError, of a store a `StoreError`."""

    @abstractmethod
    def names(self) -> list[str]:
        """The snapshots there are."""

    @abstractmethod
    def anything(self) -> list[str]:
        """Names of whatever is there, snapshot or not."""

    @abstractmethod
    def read(self, name: str, file: str) -> bytes:
        """The content of a small file of a snapshot."""

    @abstractmethod
    def taken(self, name: str) -> AbstractContextManager[Path]:
        """A local folder with the files of a snapshot, for the time of a block."""

    @abstractmethod
    def add(self, name: str, number: int, write: Callable[[Path], Path]) -> None:
        """Keep a file of a new snapshot.

        Args:
            name: of the snapshot.
            number: the same for all processes that write files of it.
            write: makes a file in the folder it is given, and returns it.
        """

    @abstractmethod
    def finish(self, name: str, number: int, mark: bytes) -> None:
        """Make a snapshot whole whose other files were all added: `mark` is the content of MARK."""

    @abstractmethod
    def discard(self, name: str, number: int) -> None:
        """Forget what was added and not finished."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a snapshot, if it is there."""

    @abstractmethod
    def sweep(self) -> None:
        """Delete what killed processes left half written; only while nobody else uses the place."""

    @abstractmethod
    def check(self) -> None:
        """See that snapshots can be written here, by writing something."""


class FolderShelf(Shelf):
    """Snapshots in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """The folders in it; one that is damaged is there, too."""
        return [path.name for path in self.folder.glob("[!.]*")]

    def anything(self) -> list[str]:
        """Names of files and folders in it."""
        return [path.name for path in self.folder.iterdir()] if self.folder.exists() else []

    def read(self, name: str, file: str) -> bytes:
        """The content of a file."""
        return (self.folder / name / file).read_bytes()

    @contextmanager
    def taken(self, name: str) -> Iterator[Path]:
        """The folder itself."""
        yield self.folder / name

    def add(self, name: str, number: int, write: Callable[[Path], Path]) -> None:
        """Write beside the place, to the disk."""
        temporary = self._temporary(name, number)
        temporary.mkdir(parents=True, exist_ok=True)
        _fsync(write(temporary))

    def finish(self, name: str, number: int, mark: bytes) -> None:
        """Rename into the place."""
        temporary = self._temporary(name, number)
        (temporary / MARK).write_bytes(mark)
        for path in (temporary / MARK, temporary):
            _fsync(path)
        temporary.rename(self.folder / name)
        _fsync(self.folder)

    def discard(self, name: str, number: int) -> None:
        """Delete what is beside the place."""
        shutil.rmtree(self._temporary(name, number), ignore_errors=True)

    def _temporary(self, name: str, number: int) -> Path:
        return self.folder / f".{name}.{number}"

    def remove(self, name: str) -> None:
        """Delete a folder."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def sweep(self) -> None:
        """Delete the folders that were not renamed."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def check(self) -> None:
        """Make the folder, and write a file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".zoray-") as file:
            file.write(b"zoray\n")


class StoreShelf(Shelf):
    """Snapshots on an object store; this machine keeps copies only for as long as they are written or read."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def names(self) -> list[str]:
        """What has a MARK."""
        return [name for name, files in self._all().items() if MARK in files]

    def read(self, name: str, file: str) -> bytes:
        """The content of an object."""
        return stores.read(stores.join(self.uri, name, file))

    @contextmanager
    def taken(self, name: str) -> Iterator[Path]:
        """A download of it."""
        with _scratch() as folder:
            stores.fetch(stores.join(self.uri, name), self._all().get(name, []), folder)
            yield folder

    def add(self, name: str, number: int, write: Callable[[Path], Path]) -> None:
        """Write here, then upload."""
        with _scratch() as folder:
            made = write(folder)
            stores.put(folder, stores.join(self.uri, name), made.name)

    def finish(self, name: str, number: int, mark: bytes) -> None:
        """Upload MARK."""
        with _scratch() as folder:
            (folder / MARK).write_bytes(mark)
            stores.put(folder, stores.join(self.uri, name), MARK)

    def discard(self, name: str, number: int) -> None:
        """Leave it to `sweep`: what has no MARK is not there."""

    def remove(self, name: str) -> None:
        """Delete its objects, MARK first."""
        stores.remove(stores.join(self.uri, name), MARK)

    def anything(self) -> list[str]:
        """Names of objects, whoever put them there."""
        return stores.names(self.uri)

    def sweep(self) -> None:
        """Delete what has no MARK, and is called as snapshots are: nobody else's objects."""
        for name, files in self._all().items():
            if MARK not in files and _SNAPSHOT.fullmatch(name):
                self.remove(name)

    def check(self) -> None:
        """Write an object."""
        stores.check_writable(self.uri)

    def _all(self) -> dict[str, list[str]]:
        """Names of the files of each snapshot, whole or not."""
        found: dict[str, list[str]] = {}
        for path in stores.names(self.uri):
            name, _, file = path.partition("/")
            if file:
                found.setdefault(name, []).append(file)
        return found


def shelf(where: Path | str) -> Shelf:
    """The shelf at a path or a URI."""
    return StoreShelf(str(where)) if stores.is_uri(str(where)) else FolderShelf(Path(where))


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = stores.cache_root() / "snapshots"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        yield Path(made)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
