"""Where `zoray watch` gets a run's status from: one function, whatever is behind it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from launch.control import attach
from zoray.errors import ResourceError, ZorayError

if TYPE_CHECKING:
    from actors.status import RunStatus

Look = Callable[[], "RunStatus | None"]
"""Says where a run is; None: nothing was heard for a second. Raises ZorayError when it cannot be asked any more."""

_INTERVAL = 0.5


@contextmanager
def looking(run: str, output_dir: str, address: str | None) -> Iterator[Look]:
    """The function that says where a run is, for the time of the block.

    Ray is asked in a process of its own: when its cluster ends, as the one of `zoray train` does with the run, Ray may
    end the process that is connected to it, or talk about it at length.
    """
    context = get_context("spawn")
    answers, there = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(there, run, output_dir, address), daemon=True)
    process.start()
    there.close()

    def look() -> RunStatus | None:
        try:
            if not answers.poll(1.0):
                return None
            said = answers.recv()
        except (EOFError, OSError):
            raise ResourceError(f"The coordinator of {run} cannot be asked any more.") from None
        if isinstance(said, ZorayError):
            raise said
        status: RunStatus = said
        return status

    try:
        yield look
    finally:
        answers.close()
        process.terminate()
        process.join(5.0)
        if process.is_alive():
            process.kill()
            process.join()


def _tell(pipe: Any, run: str, output_dir: str, address: str | None) -> None:
    """Tell of a run as long as it can be asked and somebody listens."""
    # Ctrl-C is for the one who watches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    with suppress(BrokenPipeError):
        try:
            with attach(run, output_dir, address) as live:
                pipe.send(live.status())
                while True:
                    pipe.send(live.status(_INTERVAL))
        except ZorayError as error:
            pipe.send(error)
