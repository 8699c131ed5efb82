"""The ledger: an append-only, hash-chained log of commits. It is the run; weights are only the ledger, applied.

A folder holds two files. `commits.bin` is the truth: a header (8-byte magic, u32 length, u32 crc32 of both, JSON with
sorted keys, sha256 of all that), then the records of the steps 0, 1, 2, ... as `zoray.commits` defines them. Each hash
covers the one before, so no record can be changed, moved, dropped or brought in from elsewhere unnoticed. A record is
on disk (fsync) before `append` returns; only `cut` takes the last ones away again. `head` (u64 count, hash of the
header, last hash, crc32) is written after each append and not synced; it serves only to notice a `commits.bin` that was
cut by other hands between two records, or swapped for another. One process writes; any number may read at the same
time, with `repair=False`.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zoray.commits import HASH_SIZE, HEADER_SIZE, Commit, check_hash, read_header
from zoray.errors import LedgerError
from zoray.files import Files, opened, write_all

MAGIC = b"ZORAYLG1"

_PREAMBLE = struct.Struct("<8sII")
_HEAD = struct.Struct("<Q32s32s")
_RESTORE = "restore the file from a copy; the records before this byte are intact"
_DISK = "check the path, its permissions and the free space; what was committed before is intact"
_SWAPPED = "bring back the file of records that belongs here, or delete this one to go on with what there is"


class Ledger:
    """An open ledger; made by `create` or `open`, and a context manager that closes it.

    Attributes:
        path: the file of records, `commits.bin`.
        header: what `create` was given.
        genesis: hash of the header, which the first commit follows (32 bytes).
        head: hash of the last commit, or `genesis` (32 bytes).
        warnings: what was found wrong and survived, one sentence each.
    """

    def __init__(self, folder: Path, *, writable: bool, files: Files) -> None:
        self.path, self._files, self._writable = folder / "commits.bin", files, writable
        self.warnings: list[str] = []
        self._fd = self._head_fd = -1
        with _reported("cannot open the ledger", self.path):
            try:
                # Before the records: a reader beside a live writer must not find a head that is ahead of them.
                noted = _read_head(files, folder / "head")
                self._fd = files.open(self.path, os.O_RDWR if writable else os.O_RDONLY)
                self.header, self.genesis, start = self._read_header()
                self.head, self._offsets = self.genesis, array("Q", [start])
                torn = self._scan()
                self._compare(noted)
                if writable:
                    self._settle(torn)
            except BaseException:
                self.close()
                raise

    @classmethod
    def create(cls, folder: str | os.PathLike[str], header: dict[str, Any], *, files: Files | None = None) -> Ledger:
        """Make an empty ledger in `folder`, which is made too, and open it for writing.

        Raises:
            LedgerError: the folder holds a ledger already, `header` is not JSON, or the disk refuses.
        """
        files, path = files or Files(), Path(folder) / "commits.bin"
        if path.exists():
            raise LedgerError("there is a ledger already", where=str(path), advice="resume that run, or name another")
        try:
            text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise LedgerError(f"the header of a ledger must be JSON: {error}", where=str(path)) from error
        preamble = MAGIC + struct.pack("<I", len(text))
        data = preamble + struct.pack("<I", zlib.crc32(preamble)) + text
        genesis = hashlib.sha256(data).digest()
        with _reported("cannot create the ledger", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for name, content in (("commits.tmp", data + genesis), ("head", _encode_head(0, genesis, genesis))):
                with opened(files, path.with_name(name), os.O_RDWR | os.O_CREAT | os.O_TRUNC) as fd:
                    write_all(files, fd, content, 0)
                    files.fsync(fd)
            files.rename(path.with_name("commits.tmp"), path)
        return cls(path.parent, writable=True, files=files)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, repair: bool, files: Files | None = None) -> Ledger:
        """Open the ledger of `folder` and check the whole chain.

        A torn last record (a crash in the middle of an append) is left out, with a warning. With `repair` it is cut off
        the file, which is then open for appending; without, nothing is changed and the ledger can only be read.

        Raises:
            LedgerError: there is no ledger, or it is damaged before its end, with the byte offset.
        """
        return cls(Path(folder), writable=repair, files=files or Files())

    @property
    def next_step(self) -> int:
        """The first step that is not committed; also how many commits there are."""
        return len(self._offsets) - 1

    def append(self, commit: Commit) -> None:
        """Put `commit` on disk. When this returns it survives a crash; when it raises, the file is as it was.

        Raises:
            LedgerError: not the next step, not a child of `head`, opened without `repair`, or the disk refuses.
        """
        record, end = commit.encode(), self._offsets[-1]
        if (commit.step, commit.previous) != (self.next_step, self.head):
            raise LedgerError(f"commit of step {commit.step} does not follow the ledger", where=self._where(end))
        check_hash(record, self.head)
        with self._changing(f"step {commit.step} is not committed"):
            try:
                write_all(self._files, self._fd, record, end)
                self._files.fsync(self._fd)
            except OSError:
                # A tail that cannot be cut off now is refused by the next append and seen by the next open.
                with suppress(OSError):
                    self._files.truncate(self._fd, end)
                    self._files.fsync(self._fd)
                raise
        self._offsets.append(end + len(record))
        self.head = commit.hash
        try:
            self._write_head(self.next_step, self.head)
        except OSError as error:
            # The commit is on disk and must not be reported lost; a stale head costs nothing but a check.
            self.warnings.append(f"step {commit.step} is committed, but its head file was not written: {error}")

    def cut(self, step: int) -> int:
        """Throw away the commits of `step` and later, for good: a replica with wrong weights took part in them.

        A crash on the way leaves them all or none; once this has returned, not even a power cut brings one back. If the
        disk refuses half-way, the ledger takes no commit until it is opened again. Returns how many commits are gone.

        Raises:
            LedgerError: the ledger does not reach to `step`, was opened without `repair`, or the disk refuses.
        """
        end, _ = self._span(step, self.next_step)
        with self._changing(f"the commits from step {step} on are not thrown away"):
            last = next(self.commits(step - 1, step)).hash if step else self.genesis
            # First and synced: a head that is behind is no fault, one that is ahead would accuse the commits to come.
            self._write_head(step, last)
            self._files.fsync(self._head_fd)
            self._files.truncate(self._fd, end)
            self._files.fsync(self._fd)
        gone, self.head = self.next_step - step, last
        del self._offsets[step + 1 :]
        return gone

    def commits(self, start: int = 0, stop: int | None = None) -> Iterator[Commit]:
        """The commits of the steps `start` to `stop - 1` (None: all there are), read from the file and checked again.

        Raises:
            LedgerError: the range is not in the ledger, or a record was damaged since it was opened.
        """
        stop = self.next_step if stop is None else stop
        self._span(start, stop)
        for step in range(start, stop):
            offset, end = self._span(step, step + 1)
            with _reported(f"cannot read step {step}", self._where(offset)):
                data = self._read(HASH_SIZE + end - offset, offset - HASH_SIZE)
                commit = Commit.decode(data[HASH_SIZE:], data[:HASH_SIZE])
            yield commit

    def records(self, start: int, stop: int) -> bytes:
        """The encoded records of the steps `start` to `stop - 1` in one read, unchecked: the receiver has to anyway.

        Raises:
            LedgerError: the range is not in the ledger, or cannot be read.
        """
        offset, end = self._span(start, stop)
        with _reported(f"cannot read the steps {start} to {stop}", self._where(offset)):
            data = self._read(end - offset, offset)
            if len(data) < end - offset:
                raise LedgerError(f"the file ends before step {stop}")
        return data

    def close(self) -> None:
        """Close the files. Closing twice does nothing."""
        for fd in (self._fd, self._head_fd):
            if fd >= 0:
                self._files.close(fd)
        self._fd = self._head_fd = -1

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    @contextmanager
    def _changing(self, otherwise: str) -> Iterator[None]:
        if not self._writable:
            raise LedgerError("open for reading only", where=str(self.path), advice="open it with repair=True")
        with _reported(otherwise, self.path):
            if self._files.size(self._fd) != (end := self._offsets[-1]):
                advice = "end any other writer, then open the ledger again"
                raise LedgerError("the file is not as this ledger left it", where=self._where(end), advice=advice)
            yield

    def _span(self, start: int, stop: int) -> tuple[int, int]:
        if not 0 <= start <= stop <= self.next_step:
            raise LedgerError(f"no commits {start} to {stop}: there are {self.next_step}", where=str(self.path))
        return self._offsets[start], self._offsets[stop]

    def _read_header(self) -> tuple[dict[str, Any], bytes, int]:
        preamble = self._read(_PREAMBLE.size, 0)
        if len(preamble) < _PREAMBLE.size or _PREAMBLE.unpack(preamble)[::2] != (MAGIC, zlib.crc32(preamble[:12])):
            raise LedgerError("this is not the beginning of a ledger", where=self._where(0), advice=_RESTORE)
        size = _PREAMBLE.size + _PREAMBLE.unpack(preamble)[1] + HASH_SIZE
        data = preamble + self._read(size - _PREAMBLE.size, _PREAMBLE.size)
        if len(data) < size or hashlib.sha256(data[:-HASH_SIZE]).digest() != data[-HASH_SIZE:]:
            raise LedgerError("the header is damaged", where=self._where(_PREAMBLE.size), advice=_RESTORE)
        return json.loads(data[_PREAMBLE.size : -HASH_SIZE]), data[-HASH_SIZE:], size

    def _scan(self) -> bool:
        """Find every record and check the chain; True if a torn record follows the last whole one."""
        size = self._files.size(self._fd)
        while (offset := self._offsets[-1]) < size:
            reach = offset + HEADER_SIZE
            try:
                length, step = read_header(self._read(HEADER_SIZE, offset))
                if step != self.next_step:
                    raise LedgerError(f"step {step} stands where step {self.next_step} belongs")
                reach = offset + length
                record = self._read(min(length, size - offset), offset)
                check_hash(record, self.head)
            except LedgerError as error:
                # An append that was cut short leaves nothing behind it, or the zeros of space not yet written to.
                where, did = self._where(offset), "cut off" if self._writable else "left out"
                if any(any(self._read(min(1 << 20, size - at), at)) for at in range(reach, size, 1 << 20)):
                    raise LedgerError(error.what, where=where, advice=_RESTORE) from error
                self.warnings.append(f"torn record of step {self.next_step} {did}, {where}: {error.what}")
                return True
            self._offsets.append(offset + length)
            self.head = record[-HASH_SIZE:]
        return False

    def _compare(self, noted: tuple[int, bytes, bytes] | None) -> None:
        head = self.path.with_name("head")
        if noted is None:
            self.warnings.append(f"{head} is missing or damaged: whether commits were cut off cannot be told")
            return
        count, genesis, last = noted
        known = last if count > self.next_step else self._read(HASH_SIZE, self._offsets[count] - HASH_SIZE)
        if (genesis, last) != (self.genesis, known):
            raise LedgerError("this is another ledger than the one written here last", where=str(head), advice=_SWAPPED)
        if count > self.next_step:
            self.warnings.append(f"{count - self.next_step} commits are missing: they will be computed again")

    def _settle(self, torn: bool) -> None:
        """Make what was read durable before anything is built on it: its writer may have died before its own fsync."""
        if torn:
            self._files.truncate(self._fd, self._offsets[-1])
        self._files.fsync(self._fd)
        self._head_fd = self._files.open(self.path.with_name("head"), os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        # An older head must not come back after a power cut and accuse the commits made from here on.
        self._write_head(self.next_step, self.head)
        self._files.fsync(self._head_fd)
        for directory in (self.path.parent, self.path.parent.parent):
            with opened(self._files, directory, os.O_RDONLY) as fd:
                self._files.fsync(fd)

    def _write_head(self, count: int, last: bytes) -> None:
        write_all(self._files, self._head_fd, _encode_head(count, self.genesis, last), 0)

    def _read(self, count: int, offset: int) -> bytes:
        data = b""
        while len(data) < count and (part := self._files.read(self._fd, count - len(data), offset + len(data))):
            data += part
        return data

    def _where(self, offset: int) -> str:
        return f"{self.path}, byte {offset}"


@contextmanager
def _reported(what: str, where: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LedgerError(f"{what}: {error.strerror or error}", where=str(where), advice=_DISK) from error
    except LedgerError as error:
        raise LedgerError(error.what, where=error.where or str(where), advice=error.advice or _RESTORE) from error


def _encode_head(count: int, genesis: bytes, last: bytes) -> bytes:
    body = _HEAD.pack(count, genesis, last)
    return body + zlib.crc32(body).to_bytes(4, "little")


def _read_head(files: Files, path: Path) -> tuple[int, bytes, bytes] | None:
    try:
        with opened(files, path, os.O_RDONLY) as fd:
            data = files.read(fd, _HEAD.size + 5, 0)
    except FileNotFoundError:
        return None
    if len(data) != _HEAD.size + 4 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        return None
    return _HEAD.unpack(data[:-4])
