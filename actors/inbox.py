"""Where everything that happens reaches the coordinator: answers, calls from other processes, looks at the cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from zoray.errors import ResourceError, RunError, ZorayError

Reference = Any
"""A `ray.ObjectRef`; Ray's own type is not generic in every version we support."""

Work = Callable[[], None]


class Inbox:
    """Work for the coordinator's thread, put there by any thread and done in order.

    Ray tells of each result by a callback, so that waiting for the next of many answers costs the same as for one.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Work] = SimpleQueue()

    def put(self, work: Work) -> None:
        """Let the coordinator's thread do something."""
        self._queue.put(work)

    def watch(self, references: Sequence[Reference], then: Callable[[list[Any], BaseException | None], None]) -> None:
        """Do `then(values, None)` when some results of Ray are all there, or `then([], error)` at the first error."""
        values: dict[int, Any] = {}

        def arrived(index: int, value: Any, error: BaseException | None) -> None:
            if len(values) == len(references):
                return
            values[index] = value
            if error is not None:
                values.update(dict.fromkeys(range(len(references))))
                then([], error)
            elif len(values) == len(references):
                then([values[each] for each in range(len(references))], None)

        def done(index: int, future: Any) -> None:
            error = future.exception()
            self.put(partial(arrived, index, None if error else future.result(), error))

        for index, reference in enumerate(references):
            reference.future().add_done_callback(partial(done, index))

    def turn(self, seconds: float) -> int:
        """Wait so long for work, then do all there is; returns how much that was."""
        count = 0
        try:
            work = self._queue.get(timeout=seconds)
            while True:
                count += 1
                work()
                work = self._queue.get_nowait()
        except Empty:
            return count


def fault(error: BaseException, who: str) -> ZorayError:
    """What went wrong in another process, as something the user can act on.

    A `ZorayError` is what it was before Ray wrapped it; the death of a process is a `ResourceError`.
    """
    if isinstance(error, RayTaskError):
        error = error.cause
    if isinstance(error, ZorayError):
        return error
    if isinstance(error, RayError):
        return ResourceError(
            f"{who} died: {first_line(error)}",
            advice="it may have run out of memory: use fewer replicas per machine or a shorter dtype",
        )
    return RunError(f"{who} failed: {error!r}.", advice="the traceback is in the logs of Ray (ray logs)")


def first_line(error: BaseException) -> str:
    """The first line of an error of Ray, which the user can read."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def receive(reference: Reference, who: str, seconds: float | None = None) -> Any:
    """Wait for a result of Ray, not longer than some seconds.

    Raises:
        ZorayError: what the other process raised, or that it died or does not answer.
    """
    import ray

    try:
        return ray.get(reference, timeout=seconds)
    except GetTimeoutError:
        raise ResourceError(
            f"{who} does not answer.",
            advice="its machine may be overloaded or paused: try again, or look at its log",
        ) from None
    except RayError as error:
        raise fault(error, who) from None
