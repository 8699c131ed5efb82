"""The coordinator: the one sequencer of a run. It holds no weights; every decision is the kernel's.

`prepare` gathers replicas and opens the ledger, `run` is the training loop: wait for an event, let the kernel decide,
carry its actions out.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.exporter import Exporter
from actors.fleet import Fleet, Reference, first_line, receive
from actors.journal import Journal, Progress
from actors.replica import Introduction
from zoray.config import RunConfig
from zoray.errors import LedgerError
from zoray.identity import check_header, header_digest
from zoray.ledger import Ledger
from zoray.protocol import (
    AppendCommit,
    AppendFailed,
    Assign,
    CommitDurable,
    Event,
    Finish,
    Release,
    ReplicaLost,
    ReplicaReady,
    Report,
    Settings,
    StopRequested,
    Tick,
    Warn,
    decode_answer,
    encode_request,
    initial_state,
    transition,
)
from zoray.runs import RunFolder
from zoray.schedule import learning_rate

_TICK = 0.1


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before the first step."""

    introduction: Introduction
    replicas: int
    next_step: int
    metrics_url: str
    ledger_bytes: int


class Coordinator:
    """One run's sequencer. A plain class; the launcher makes it remote.

    Args:
        config: of the run, as resolved.
        path: the run's folder.
    """

    def __init__(self, config: RunConfig, path: str) -> None:
        self.config, self.folder = config, RunFolder(Path(path))
        self.fleet = Fleet(config, str(self.folder.snapshots))
        self.pending: dict[Reference, str] = {}
        self.events: deque[Event] = deque()
        self.finish: Finish | None = None
        self.exporter = Exporter(self.folder.name, config.model, config.max_steps)
        self.journal = Journal(self.folder, self.exporter, config.max_steps)

    def prepare(self, resume: bool) -> Prepared:
        """Start the replicas, check that they agree, and create or open the ledger.

        Raises:
            ZorayError: whatever is wrong with the model, the data, the configuration, the ledger or the machines.
        """
        try:
            return self._prepare(resume)
        except BaseException:
            self.fleet.close()
            self.exporter.close()
            raise

    def _prepare(self, resume: bool) -> Prepared:
        url = f"http://{socket.gethostname()}:{self.exporter.serve(self.config.metrics_port)}/metrics"
        introductions = self.fleet.start(self.config.replicas)
        first = next(iter(introductions.values()))
        for name, introduction in introductions.items():
            first.identity.check(introduction.identity, f"replica {name}")
        self._open_ledger(first, resume)
        heard = self._join(list(introductions))
        examples = self.config.per_direction_batch_size * self.config.directions * self.config.microbatches
        self.journal.begin(self.ledger.next_step, len(introductions), url, examples * first.tokens_per_example)
        for text in (*self.ledger.warnings, *first.warnings, *first.identity.verdict.reasons, *heard):
            self.journal.warn(text)
        self.journal.say(f"{'resumed' if resume else 'started'} at step {self.ledger.next_step}")
        self.state = initial_state(
            settings(self.config, first.eval_shards),
            self.ledger.next_step,
            self.ledger.head,
            skipped=self._skipped(),
            now=time.monotonic(),
        )
        return Prepared(first, len(introductions), self.ledger.next_step, url, self.ledger_bytes())

    def run(self) -> Finish:
        """The training loop, until the kernel says that the run is over."""
        while self.finish is None:
            self.events.extend(self._arrived())
            self._decide()
        self._close(self.finish)
        return self.finish

    def stop(self) -> None:
        """End the run at the next step boundary; asked twice, at once."""
        self.events.append(StopRequested())

    def progress(self) -> Progress:
        """Where the run is."""
        return self.journal.progress

    def ledger_bytes(self) -> int:
        """Size of the ledger on disk."""
        return sum(path.stat().st_size for path in self.folder.ledger.iterdir())

    def _arrived(self) -> list[Event]:
        """What has happened since the last call, waiting for something to happen, but not longer than a tick."""
        ready, _ = ray.wait(list(self.pending), num_returns=1, timeout=_TICK) if self.pending else ([], [])
        events: list[Event] = []
        for reference in ready:
            name = self.pending.pop(reference)
            try:
                data = ray.get(reference)
            except (RayActorError, RayTaskError) as error:
                events.append(ReplicaLost(name, first_line(error)))
                continue
            self.journal.exchanged(received=len(data))
            events.append(decode_answer(name, data))
        return events or [Tick()]

    def _decide(self) -> None:
        """Let the kernel decide about every event there is, and carry out what it says."""
        while self.events and self.finish is None:
            self.state, actions = transition(self.state, self.events.popleft(), time.monotonic())
            for action in actions:
                self._carry_out(action)
        self.exporter.beat(len(self.state.members))
        if self.finish is None and not self.state.members:
            self.finish = self._deserted()

    def _carry_out(self, action: Any) -> None:
        match action:
            case Assign(name, item, start):
                request = encode_request(item, b"".join(self.records[start : item.step]))
                self.journal.exchanged(sent=len(request))
                self.pending[self.fleet.send(name, request)] = name
            case AppendCommit(commit):
                try:
                    self.ledger.append(commit)
                    self.records.append(commit.encode())
                    self.events.append(CommitDurable(commit.step))
                except LedgerError as error:
                    self.events.append(AppendFailed(commit.step, error.what))
            case Report(record):
                self.journal.report(record)
            case Release(name, reason):
                self.journal.say(f"replica {name} leaves: {reason}")
                self.fleet.remove(name)
            case Warn(text):
                self.journal.warn(text)
            case Finish():
                self.finish = action

    def _deserted(self) -> Finish:
        advice = f"look into {self.folder.log}, then continue with `zoray resume {self.folder.name}`"
        return Finish("failed", self.state.step, "no replica is left", advice)

    def _open_ledger(self, first: Introduction, resume: bool) -> None:
        if resume:
            self.ledger = Ledger.open(self.folder.ledger, repair=True)
            check_header(self.ledger.header, first.identity, self.config, str(self.folder.config_path))
        else:
            self.ledger = Ledger.create(self.folder.ledger, dict(first.header))
        self.records = [commit.encode() for commit in self.ledger.commits()]

    def _join(self, names: list[str]) -> list[str]:
        """Let replicas into the run; returns what they warn of, each thing once."""
        run = header_digest(self.ledger.header)
        waiting = {name: self.fleet.join(name, self.ledger.genesis, run, self.ledger.next_step) for name in names}
        warnings: list[str] = []
        for name, reference in waiting.items():
            step, heard = receive(reference, name)
            self.events.append(ReplicaReady(name, step))
            warnings += heard
        return list(dict.fromkeys(warnings))

    def _skipped(self) -> int:
        """Null commits in a row at the end of the ledger."""
        last = list(self.ledger.commits(max(0, self.ledger.next_step - self.config.max_skipped_steps)))
        return sum(1 for _ in takewhile(lambda commit: not commit.applied, reversed(last)))

    def _close(self, finish: Finish) -> None:
        if finish.digest is not None and finish.reason == "stopped":
            self.journal.digest(finish.step, finish.digest)
        self.journal.say(f"{finish.reason}: {finish.text}")
        self.journal.finished()
        self.fleet.close()
        self.ledger.close()
        self.exporter.close()


def settings(config: RunConfig, eval_shards: int) -> Settings:
    """What the kernel needs of a configuration."""
    rate = partial(
        learning_rate,
        learning_rate=config.learning_rate,
        max_steps=config.max_steps,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        warmup_ratio=config.warmup_ratio,
    )
    return Settings(
        max_steps=config.max_steps,
        directions=config.directions,
        learning_rate=rate,
        microbatches=config.microbatches,
        weight_decay=config.weight_decay,
        max_projected_gradient=config.max_projected_gradient,
        eval_steps=config.eval_steps,
        eval_shards=eval_shards,
        eval_on_start=config.eval_on_start,
        save_steps=config.save_steps,
        max_skipped_steps=config.max_skipped_steps,
    )
