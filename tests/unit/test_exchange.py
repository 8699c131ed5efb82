"""What the coordinator makes of the answers of a replica's processes."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

pytest.importorskip("ray", reason="the actors need Ray")

from actors.exchange import Exchange
from actors.inbox import Inbox
from zoray.memory.base import ELSEWHERE
from zoray.protocol import Answer, Failed, Item, Kind, ProbeScalars, Refused, encode_answer


class Reference:
    """A result that is not there yet, as Ray's are."""

    def __init__(self) -> None:
        self._future: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self._future

    def give(self, value: object) -> None:
        if isinstance(value, BaseException):
            self._future.set_exception(value)
        else:
            self._future.set_result(value)


class Told:
    """An exchange with some processes, and what it says."""

    def __init__(self, processes: int, items: int) -> None:
        self.inbox, self.references = Inbox(), tuple(Reference() for _ in range(processes))
        self.outcomes: list[Any] = []
        self.broken: list[BaseException | Failed] = []
        self.received = 0
        Exchange("r", self.inbox, self.references, items, self._answered, self.broken.append)

    def _answered(self, outcomes: list[Any], received: int) -> None:
        self.outcomes += outcomes
        self.received += received

    def give(self, rank: int, value: object) -> None:
        self.references[rank].give(value)
        self.inbox.turn(0.0)


def item(direction: int) -> Item:
    return Item(Kind.PROBE, 3, direction)


def answer(direction: int) -> Answer:
    return Answer("r", item(direction), ProbeScalars(1.0, 2.0, 0.0, 0.0))


def test_answers_are_told_when_all_are_there() -> None:
    told = Told(3, 3)
    for rank in (2, 0):
        told.give(rank, encode_answer(answer(rank)))
    assert told.outcomes == []
    told.give(1, encode_answer(answer(1)))
    assert told.outcomes == [answer(0), answer(1), answer(2)] and told.broken == []
    assert told.received == 3 * len(encode_answer(answer(0)))


def test_answers_of_processes_that_only_help_do_not_count() -> None:
    told = Told(3, 2)
    for rank in range(3):
        told.give(rank, encode_answer(answer(min(rank, 1))))
    assert told.outcomes == [answer(0), answer(1)]


def test_a_refusal_is_told_once() -> None:
    told, refusals = Told(2, 2), [Refused("r", item(k), 2, "a commit is missing") for k in range(2)]
    for rank in range(2):
        told.give(rank, encode_answer(refusals[rank]))
    assert told.outcomes == refusals[:1] and told.broken == []


def test_a_failure_of_one_process_is_told_at_once_and_ends_the_replica() -> None:
    told, failure = Told(3, 3), Failed("r", item(1), "out of memory")
    told.give(1, encode_answer(failure))
    assert told.outcomes == [failure] and told.broken == [failure]
    # The others are killed while they wait for it.
    told.give(0, RuntimeError("killed"))
    told.give(2, encode_answer(answer(2)))
    assert told.outcomes == [failure] and told.broken == [failure]


def test_a_snapshot_that_fails_does_not_end_the_replica_and_the_reason_is_told() -> None:
    """Its processes agree on that before any of them goes on (`Memory.together`)."""
    told, snapshot = Told(3, 1), Item(Kind.SNAPSHOT, 3)
    for rank, reason in ((0, f"OSError: {ELSEWHERE}"), (2, f"OSError: {ELSEWHERE}"), (1, "OSError: disk full")):
        assert told.outcomes == []
        told.give(rank, encode_answer(Failed("r", snapshot, reason)))
    assert told.outcomes == [Failed("r", snapshot, "OSError: disk full")] and told.broken == []


def test_a_failure_of_a_replica_of_one_process_does_not_end_it() -> None:
    told, failure = Told(1, 1), Failed("r", item(0), "out of memory")
    told.give(0, encode_answer(failure))
    assert told.outcomes == [failure] and told.broken == []


@pytest.mark.parametrize("processes", [1, 3])
def test_a_death_is_told_at_once_and_no_answer_after_it(processes: int) -> None:
    told, death = Told(processes, processes), RuntimeError("the actor died")
    told.give(processes - 1, death)
    assert told.broken == [death]
    for rank in range(processes - 1):
        told.give(rank, encode_answer(answer(rank)))
    assert told.outcomes == []


def test_nonsense_is_no_answer() -> None:
    told = Told(1, 1)
    told.give(0, b"nonsense")
    assert told.outcomes == [] and "no answer" in str(told.broken[0])
