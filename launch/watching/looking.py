"""Where `zoray watch` gets a run's status from: one function, whether Ray or its job server is behind it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from launch.control import Known, attach, known_of, status_of
from zoray.errors import ResourceError, RunError, ZorayError

if TYPE_CHECKING:
    from actors.status import RunStatus

Look = Callable[[], "RunStatus | None"]
"""Says where a run is; None: nothing was heard for a second. Raises ZorayError when it cannot be asked any more."""

_INTERVAL = 0.5


class HasEnded(RunError):
    """The run is over; `known` is what its folder says of it, wherever that is."""

    def __init__(self, known: Known) -> None:
        super().__init__(f"The run {known.name} is not in progress: {known.words}.", where=known.path)
        self.known = known

    def __reduce__(self) -> tuple[Any, ...]:
        return HasEnded, (self.known,)


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


@contextmanager
def looking_over_http(run: str, output_dir: str, http: str) -> Iterator[Look]:
    """As `looking`, through the job server at `http` alone; a run that is over raises `HasEnded`."""
    from launch.jobs.remote import asks

    words = ["status", run, "--json", *(["--output-dir", output_dir] if output_dir != "runs" else [])]
    answers = asks(http, *words)

    def look() -> RunStatus | None:
        try:
            said = json.loads(next(answers))
        except ZorayError:
            # It may have ended while it was being asked: then its folder says how.
            with closing(asks(http, *words)) as again:
                said = json.loads(next(again))
            if "progress" in said:
                raise
        if "progress" not in said:
            raise HasEnded(known_of(said))
        return status_of(said)

    try:
        yield look
    finally:
        answers.close()
