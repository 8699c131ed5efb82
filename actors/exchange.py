"""One assignment and what comes back of it, from each of a replica's processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from actors.inbox import Inbox, Reference
from zoray.errors import RunError
from zoray.memory.base import ELSEWHERE
from zoray.protocol import Answer, Failed, Kind, Refused, decode_answer

Outcome = Answer | Refused | Failed


class Exchange:
    """Collects the answers of a replica's processes to one assignment.

    They depend on each other: when one of them cannot go on, the others wait for it in a collective and never answer.
    What keeps the replica from an item is told once, and what breaks one process is the end of all. Not so a snapshot
    that cannot be written: on that they agree before any of them goes on.

    Args:
        name: of the replica.
        inbox: of the coordinator.
        references: the results of `ReplicaActor.work`, one per process.
        items: how many items there were; processes beyond that ran one of another's, and their answers do not count.
        answered: is told what came of the items, and the bytes that were received.
        broken: is told what ended the replica: an error of Ray's, or the failure just told.
    """

    def __init__(
        self,
        name: str,
        inbox: Inbox,
        references: tuple[Reference, ...],
        items: int,
        answered: Callable[[list[Outcome], int], None],
        broken: Callable[[BaseException | Failed], None],
    ) -> None:
        self._name, self._items, self._answered, self._broken = name, items, answered, broken
        self._missing, self._received, self._over = len(references), 0, False
        self._outcomes: dict[int, Outcome] = {}
        for rank, reference in enumerate(references):
            inbox.watch((reference,), partial(self._take, rank, len(references)))

    def _take(self, rank: int, size: int, data: list[bytes], error: BaseException | None) -> None:
        if self._over:
            return
        if error is None:
            self._received += len(data[0])
            try:
                outcome = decode_answer(self._name, data[0])
            except RunError as nonsense:
                error = nonsense
        if error is not None:
            self._over = True
            self._broken(error)
            return
        self._missing -= 1
        self._outcomes[rank] = outcome
        if isinstance(outcome, Failed) and size > 1 and outcome.item.kind is not Kind.SNAPSHOT:
            self._over = True
            self._answered([outcome], self._received)
            self._broken(outcome)
        elif not self._missing:
            everything = [outcome for _, outcome in sorted(self._outcomes.items())]
            told: list[Outcome] = [outcome for outcome in everything if not isinstance(outcome, Answer)]
            # The one that knows why is the one to hear.
            told.sort(key=lambda outcome: isinstance(outcome, Failed) and ELSEWHERE in outcome.reason)
            self._answered(told[:1] or everything[: self._items], self._received)
