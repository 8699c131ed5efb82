"""Where the bytes of units lie while no device has them: in the host's memory, or in a file."""

from __future__ import annotations

import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zoray.errors import ResourceError
from zoray.memory.units import Unit

_PAGE = 4096


class Backing(ABC):
    """Bytes of units.

    Attributes:
        fleeting: whether what `window` shows is gone after its block.
    """

    fleeting = False

    @abstractmethod
    def reserve(self, unit: Unit) -> None:
        """Make a place for a unit's bytes.

        Raises:
            ResourceError: there is not enough of it.
        """

    @abstractmethod
    def read(self, unit: Unit, into: torch.Tensor) -> None:
        """Copy all of a unit's bytes to a device; on CUDA it has happened when the current stream gets there."""

    @abstractmethod
    def write(self, unit: Unit, values: torch.Tensor) -> None:
        """Take all of a unit's bytes from a device; from CUDA they are there when the current stream gets there."""

    @abstractmethod
    @contextmanager
    def window(self, unit: Unit, start: int, stop: int, writing: bool) -> Iterator[torch.Tensor]:
        """Some of a unit's bytes in the host's memory, for the time of the block.

        Args:
            writing: what is written to them is kept.
        """

    def resident(self, unit: Unit) -> torch.Tensor | None:
        """A unit's bytes, if they are in the host's memory."""
        return None


class Host(Backing):
    """The host's memory.

    Args:
        pinned: keep it from being paged out, so that a device reads and writes it by itself.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._bytes: dict[Unit, torch.Tensor] = {}

    def reserve(self, unit: Unit) -> None:
        """Memory of the unit's size, no more: torch's own allocator of pinned memory takes the next power of two."""
        values = self._bytes[unit] = torch.empty(unit.size, dtype=torch.uint8)
        if self._pinned and unit.size:
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            if int(runtime.cudaHostRegister(values.data_ptr(), unit.size, 0)):
                raise ResourceError(
                    f"{unit.size:,} bytes more of the machine's memory cannot be kept from being paged out.",
                    where="memory",
                    advice="raise the limit of locked memory (ulimit -l), or use offload: nvme",
                )
            weakref.finalize(values, runtime.cudaHostUnregister, values.data_ptr())

    def read(self, unit: Unit, into: torch.Tensor) -> None:
        """See `Backing`."""
        into.copy_(self._bytes[unit], non_blocking=True)

    def write(self, unit: Unit, values: torch.Tensor) -> None:
        """See `Backing`."""
        self._bytes[unit].copy_(values, non_blocking=True)

    @contextmanager
    def window(self, unit: Unit, start: int, stop: int, writing: bool) -> Iterator[torch.Tensor]:
        """A view."""
        yield self._bytes[unit][start:stop]

    def resident(self, unit: Unit) -> torch.Tensor | None:
        """The unit's bytes."""
        return self._bytes[unit]


class File(Backing):
    """A file without a name on a fast disk, gone with the process however it ends.

    It is read and written by explicit calls: a mapped file would be read page by page by the very computation that is
    to overlap with reading, and would end the process where an error of the disk should be reported.

    Args:
        folder: where the file is.
        pinned: see `Host`; of the one buffer that stands between the file and a device.
    """

    fleeting = True

    def __init__(self, folder: Path, pinned: bool) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (as long as the weights)
        self._pinned = pinned
        self._places: dict[Unit, int] = {}
        self._end = 0
        self._between = torch.empty(0, dtype=torch.uint8)

    def reserve(self, unit: Unit) -> None:
        """Reserve room on the disk, so that it is not found full later."""
        self._places[unit] = self._end
        if unit.size:
            try:
                os.posix_fallocate(self._file.fileno(), self._end, unit.size)
            except OSError as error:
                raise ResourceError(
                    f"There is no room for weights in files: {error.strerror}.",
                    where="memory.nvme_path",
                    advice="name a folder on a disk that has room for all weights of the model",
                ) from error
        self._end += -(-unit.size // _PAGE) * _PAGE

    def read(self, unit: Unit, into: torch.Tensor) -> None:
        """See `Backing`."""
        if into.device.type == "cpu":
            self._pread(into, self._places[unit])
            return
        between = self._buffer(unit.size)
        self._pread(between, self._places[unit])
        into.copy_(between, non_blocking=True)

    def write(self, unit: Unit, values: torch.Tensor) -> None:
        """See `Backing`; it has happened when this returns."""
        if values.device.type != "cpu":
            between = self._buffer(unit.size)
            between.copy_(values, non_blocking=True)
            torch.cuda.current_stream().synchronize()
            values = between
        self._pwrite(values, self._places[unit])

    @contextmanager
    def window(self, unit: Unit, start: int, stop: int, writing: bool) -> Iterator[torch.Tensor]:
        """A copy, written back if it may have been written to."""
        values = torch.empty(stop - start, dtype=torch.uint8)
        self._pread(values, self._places[unit] + start)
        yield values
        if writing:
            self._pwrite(values, self._places[unit] + start)

    def _buffer(self, size: int) -> torch.Tensor:
        """The buffer between the file and a device, when nothing is on its way through it any more."""
        torch.cuda.current_stream().synchronize()
        if len(self._between) < size:
            self._between = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        return self._between[:size]

    def _pread(self, values: torch.Tensor, position: int) -> None:
        view = _bytes_of(values)
        while view:
            count = os.preadv(self._file.fileno(), [view], position)
            if not count:
                raise OSError("the file of offloaded weights has become shorter")
            view, position = view[count:], position + count

    def _pwrite(self, values: torch.Tensor, position: int) -> None:
        view = _bytes_of(values)
        while view:
            count = os.pwrite(self._file.fileno(), view, position)
            view, position = view[count:], position + count


def _bytes_of(values: torch.Tensor) -> memoryview:
    array: Any = values.numpy()
    return memoryview(array)
