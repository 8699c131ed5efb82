"""An undisturbed run with one replica, in this process and without Ray: the core, and the decisions of its kernel."""

from __future__ import annotations

from collections import deque
from typing import Any

from actors.replica import ReplicaActor
from actors.settings import settings
from zoray.config import RunConfig
from zoray.identity import header_digest
from zoray.ledger import Ledger
from zoray.protocol import (
    AppendCommit,
    Assign,
    CommitDurable,
    Event,
    Finish,
    ReplicaReady,
    decode_answer,
    encode_request,
    initial_state,
    transition,
)
from zoray.runs import RunFolder

NAME = "r0"


def undisturbed(config: RunConfig) -> tuple[RunFolder, Finish]:
    """Do all that the run is; returns its folder, and how it ended."""
    folder = RunFolder.create(config, "undisturbed")
    replica = ReplicaActor(NAME, config, str(folder.snapshots))
    about = replica.introduce()
    with Ledger.create(folder.ledger, dict(about.header)) as ledger:
        replica.join(ledger.genesis, header_digest(ledger.header), {})
        state = initial_state(settings(config, about.eval_shards), 0, ledger.head)
        events = deque[Event]([ReplicaReady(NAME, 0)])
        while True:
            state, actions = transition(state, events.popleft(), 0.0)
            for action in actions:
                if isinstance(action, Finish):
                    return folder, action
                events.extend(_carried_out(action, replica, ledger))


def _carried_out(action: Any, replica: ReplicaActor, ledger: Ledger) -> list[Event]:
    match action:
        case Assign(_, item, start):
            records = ledger.records(start, item.step) if start < item.step else b""
            return [decode_answer(NAME, replica.work(encode_request(item, records)))]
        case AppendCommit(commit):
            ledger.append(commit)
            return [CommitDurable(commit.step)]
    return []
