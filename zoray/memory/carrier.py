"""Carrying units to a device and back while it computes: a thread, a stream and a few buffers.

The thread does one thing after the other: it copies a unit in, lets it be updated, and copies it back. On CUDA it does
no more than give orders to a stream of its own; events keep that and the stream of the forward in order.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from zoray.memory.backing import Backing
from zoray.memory.units import Unit

Change = Callable[[torch.Tensor], None]
"""Updates a unit's bytes in place, wherever they are."""


@dataclass(eq=False, slots=True)
class Load:
    """A unit on its way to the device, or there.

    Attributes:
        buffer: of the unit's size or larger.
        arrived: ends when the unit is in it; on CUDA with an event that the computation has to wait for.
        done: ends when nothing is to be copied from it any more.
    """

    buffer: torch.Tensor
    arrived: Future[Any]
    done: Future[Any]


class Carrier:
    """Carries units between a backing and a device.

    Args:
        backing: where they lie.
        device: where they are used.
        room: bytes of buffers, in use or not; more are made only if those in use leave no choice.
    """

    def __init__(self, backing: Backing, device: torch.device, room: int) -> None:
        self.backing, self.device, self.room = backing, device, room
        self.used = 0
        self._free: list[Load] = []
        self._idle = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="zoray-carrier")
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last: Future[Any] | None = None
        self._fault: BaseException | None = None

    def send(self, unit: Unit, change: Change | None = None) -> Load:
        """Begin to bring a unit in, with a change that is made to it on its way and kept.

        Raises:
            OSError: anything before failed: the weights are not whole any more.
        """
        self._check()
        buffer = self._take(unit.size)
        ready = torch.cuda.current_stream(self.device).record_event() if self._stream else None
        arrived = done = self._thread.submit(self._noted, self._bring, unit, buffer, change, ready)
        if change is not None and self._changed_there(unit) is None:
            done = self._thread.submit(self._noted, self._return, unit, buffer)
        self._last = done
        return Load(buffer, arrived, done)

    def change(self, unit: Unit, change: Change) -> None:
        """Begin to change a unit, which need not be brought in for anything else."""
        self._check()
        there = self._changed_there(unit)
        if there is None:
            self.give_back(self.send(unit, change))
        else:
            self._last = self._thread.submit(self._noted, change, there)

    def arrive(self, load: Load) -> torch.Tensor:
        """The buffer, once the unit is in it, as far as the current stream is concerned."""
        event = load.arrived.result()
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        return load.buffer

    def give_back(self, load: Load) -> None:
        """A unit is not wanted on the device any more; its buffer is another's, unless something still looks at it."""
        self.used -= len(load.buffer)
        self._idle += len(load.buffer)
        self._free.append(load)

    def wait(self) -> None:
        """Wait until everything is where it belongs.

        Raises:
            OSError: something failed.
        """
        if self._last is not None:
            self._last.exception()
        self._check()
        if self._stream:
            self._stream.synchronize()

    def _check(self) -> None:
        if self._fault is not None:
            raise OSError(f"offloaded weights could not be read or written: {self._fault}") from self._fault

    def _take(self, size: int) -> torch.Tensor:
        """The smallest free buffer that is large enough and not out of proportion, or a new one."""
        for load in sorted(self._free, key=lambda load: len(load.buffer)):
            if size <= len(load.buffer) <= 16 * size:
                self._forget(load)
                load.done.exception()
                if not _is_seen(load.buffer):
                    self.used += len(load.buffer)
                    return load.buffer
        while self._free and self.used + self._idle + size > self.room:
            self._forget(max(self._free, key=lambda load: len(load.buffer)))
        self.used += size
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        if self._stream:
            buffer.record_stream(self._stream)
        return buffer

    def _forget(self, load: Load) -> None:
        self._free.remove(load)
        self._idle -= len(load.buffer)

    def _changed_there(self, unit: Unit) -> torch.Tensor | None:
        """A unit's bytes where they lie, if that is where it is changed: a processor needs no copy for that."""
        return None if self._stream else self.backing.resident(unit)

    def _noted(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do something in the thread and on the stream; nothing is done any more after a fault."""
        self._check()
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream):
                return work(*args)
        except BaseException as fault:
            self._fault = fault
            raise

    def _bring(self, unit: Unit, buffer: torch.Tensor, change: Change | None, ready: Any) -> Any:
        if ready is not None:
            # The buffer's memory may have been in use until then.
            self._stream.wait_event(ready)
        there = self._changed_there(unit)
        if change is not None and there is not None:
            change(there)
        self.backing.read(unit, buffer[: unit.size])
        if change is not None and there is None:
            change(buffer[: unit.size])
        return self._stream.record_event() if self._stream else None

    def _return(self, unit: Unit, buffer: torch.Tensor) -> None:
        # No view of the buffer may outlive this, not even as an argument: see `_is_seen`.
        self.backing.write(unit, buffer[: unit.size])


def _is_seen(buffer: torch.Tensor) -> bool:
    """Whether other tensors view a buffer's memory: an output that is a view of its module's parameter, for one."""
    storage = buffer.untyped_storage()
    # The buffer and the line above.
    return int(torch._C._storage_Use_Count(storage._cdata)) > 2
