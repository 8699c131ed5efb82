"""The coordinator: the one sequencer of a run. It holds no weights; every decision is the kernels'.

`prepare` gathers the first replicas and opens the ledger, `run` is the training loop: wait for what happens, let the
kernels decide, carry their actions out. Two kernels decide: `zoray.protocol` what is computed and by whom,
`zoray.protocol.membership` which replicas there are.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from actors.exchange import Exchange, Outcome
from actors.exporter import Exporter
from actors.inbox import Inbox, fault, first_line
from actors.journal import Journal, Progress
from actors.lock import RunLock
from actors.replica import Introduction
from actors.roster import Roster
from actors.settings import settings
from actors.status import RunStatus, describe
from actors.trackers import Trackers, require
from zoray.commits import Commit
from zoray.config import RunConfig, with_memory
from zoray.errors import LedgerError
from zoray.identity import check_header, check_newcomer
from zoray.ledger import Ledger
from zoray.protocol import (
    AppendCommit,
    AppendFailed,
    Assign,
    CommitDurable,
    Event,
    Failed,
    Finish,
    Release,
    ReplicaLost,
    Report,
    Rewind,
    Rewound,
    State,
    StopRequested,
    Tick,
    Warn,
    encode_request,
    initial_state,
    transition,
)
from zoray.protocol.membership import SlotPhase
from zoray.runs import RunFolder
from zoray.snapshot import sweep
from zoray.stores import StoreError

_TICK = 0.1
_OVERTAKEN = "another coordinator has taken this run over", "follow that one: `zoray list` shows the runs in progress"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before the first step."""

    introduction: Introduction
    replicas: int
    next_step: int
    metrics_url: str


class Coordinator:
    """One run's sequencer. A plain class; the launcher makes it remote, under the name `actor_name`.

    Args:
        config: of the run, as resolved.
        path: the run's folder.
        embedded: Ray runs on this machine for this run alone.
    """

    def __init__(self, config: RunConfig, path: str, embedded: bool = False) -> None:
        self.config, self.folder, self.embedded = config, RunFolder(Path(path)), embedded
        self.lock = RunLock(self.folder.path)
        self.inbox = Inbox()
        self.exporter = Exporter(self.folder.name, config.model, config.max_steps)
        self.journal = Journal(self.folder, self.exporter, config.max_steps, Trackers(config, self.folder))
        self.events: deque[Event] = deque()
        self.roster = Roster(
            config, self.folder, self.inbox, self.journal, embedded, welcome=self._welcome, tell=self.events.append
        )
        self._ledger: Ledger | None = None
        self.state: State | None = None
        self.finish: Finish | None = None
        self._ended = threading.Event()
        self._ticked = 0.0

    @property
    def ledger(self) -> Ledger:
        """The run's ledger, open from the first replica's introduction on."""
        assert self._ledger is not None
        return self._ledger

    def prepare(self, resume: bool, break_lock: bool = False) -> Prepared:
        """Gather the first replicas, check that they agree, and create or open the ledger.

        Raises:
            ZorayError: whatever is wrong with the model, the data, the configuration, the ledger or the machines, or
                another coordinator has this run.
        """
        self.lock.acquire(break_lock)
        try:
            return self._prepare(resume)
        except BaseException:
            self._shut()
            raise

    def run(self) -> Finish:
        """The training loop, until the kernel says that the run is over."""
        try:
            while self.finish is None:
                try:
                    self._wait()
                    self._decide()
                except (OSError, LedgerError) as error:
                    self.finish = self._storage(error)
            self._conclude(self.finish)
            return self.finish
        finally:
            self._ended.set()
            self._shut()

    def stop(self) -> None:
        """End the run at the next step boundary; asked twice, at once."""
        self.inbox.put(partial(self.events.append, StopRequested()))

    def scale(self, target: int, memory: str | None = None) -> RunStatus:
        """Change the number of replicas, or how new ones are held, while the run goes on; returns where it was before.

        Args:
            target: replicas in all.
            memory: section `memory` of the replicas that are started from now on, as YAML; None: as it was.

        Raises:
            ConfigError: the number is below the run's minimum or above its maximum, or there is no such memory.
        """
        before = self.status()
        self.roster.scale(target, None if memory is None else with_memory(self.config, memory))
        return before

    def progress(self) -> Progress:
        """Where the run is."""
        return self.journal.progress

    def status(self, wait: float = 0.0) -> RunStatus:
        """Where the run is, and its replicas, after some seconds, or as soon as it has ended."""
        self._ended.wait(wait)
        return describe(
            self.folder.name,
            self.finish,
            self.roster.members,
            self.state,
            self.roster.admission.introductions,
            self.journal.progress,
            time.monotonic(),
        )

    def _storage(self, error: OSError | LedgerError) -> Finish:
        """The run's folder cannot be written or read any more; what is committed is on disk."""
        step = self.state.step if self.state is not None else 0
        text = error.what if isinstance(error, LedgerError) else f"the run's folder cannot be written: {error}"
        return Finish("storage", step, text, f"make room or repair the storage under {self.folder.path}, then resume")

    def _wait(self) -> None:
        """Take in what has happened; wait for something to happen, but not longer than a tick."""
        self.inbox.turn(_TICK)
        if self.lock.lost:
            self.finish = Finish("storage", self.state.step if self.state else 0, *_OVERTAKEN)
        elif self.roster.hopeless is not None:
            advice = f"look into {self.folder.log}, then continue with `zoray resume {self.folder.path}`"
            self.finish = Finish("failed", self.state.step if self.state else 0, self.roster.hopeless, advice)
        now = time.monotonic()
        if now - self._ticked >= _TICK:
            self._ticked = now
            self.events.append(Tick())
            if self.exporter.scraped():
                self.roster.weigh()

    def _decide(self) -> None:
        """Let the kernel decide about every event there is, and carry out what it says."""
        while self.events and self.finish is None:
            assert self.state is not None
            self.state, actions = transition(self.state, self.events.popleft(), time.monotonic())
            for action in actions:
                self._carry_out(action)
        assert self.state is not None
        self.exporter.beat(self.roster.members, self.state)

    def _carry_out(self, action: Any) -> None:
        match action:
            case Assign(name, item, start, beside) if name in self.roster.fleet:
                records = self.ledger.records(start, item.step) if start < item.step else b""
                requests = [encode_request(each, records) for each in (item, *beside)]
                references = self.roster.fleet.work(name, requests)
                self.journal.exchanged(sent=len(requests[0]) * len(references))
                answered, broken = partial(self._answered, name), partial(self._broken, name)
                Exchange(name, self.inbox, references, len(requests), answered, broken)
            case Assign():
                # It has ended in this very turn; the kernel will hear of it next.
                pass
            case AppendCommit(commit):
                try:
                    self.ledger.append(commit)
                    self.events.append(CommitDurable(commit.step))
                except LedgerError as error:
                    self.events.append(AppendFailed(commit.step, error.what))
            case Rewind(step):
                self._rewind(step)
            case Report(record):
                self.journal.report(record)
            case Release(name, reason, cause):
                self.journal.say(f"replica {name} leaves: {reason}")
                self.roster.gone(name, reason, fault=cause not in ("drained", "rewound"))
            case Warn(text):
                self.journal.warn(text)
            case Finish():
                self.finish = action

    def _rewind(self, step: int) -> None:
        """Cut the ledger, and forget whatever was made of the commits that are cut away."""
        self.roster.restart_newcomers("it has replayed commits that are cut away")
        try:
            self.ledger.cut(step)
        except LedgerError as error:
            self.events.append(AppendFailed(step, error.what))
            return
        # One of the very step may have been written by the replica that was wrong.
        self._sweep(after=step - 1)
        self.journal.rewound(step)
        assert self.state is not None
        recent = self._recent(self.state.settings.optimizer.reach)
        self.events.append(Rewound(step, self.ledger.head, self._skipped(), recent))

    def _welcome(self, name: str, introduction: Introduction) -> None:
        """The handshake. The first replica's word is compared with the ledger, every other one's with the first's."""
        check_newcomer(introduction.identity, self.config, f"replica {name}")
        if self._ledger is None:
            self._first = introduction
            self._ledger = self.roster.admission.ledger = self._open_ledger(introduction)
        self._first.identity.check(introduction.identity, f"replica {name}")

    def _answered(self, name: str, outcomes: list[Outcome], received: int) -> None:
        if name in self.roster.fleet:
            self.journal.exchanged(received=received)
            self.events += outcomes

    def _broken(self, name: str, error: BaseException | Failed) -> None:
        """An assignment has no answer, or one that ends the replica."""
        if name not in self.roster.fleet:
            return
        if isinstance(error, ActorUnavailableError) and self.roster.fleet.width(name) == 1:
            # The request or its answer is lost; the kernel asks again when it is overdue, and may ask another.
            self.journal.say(f"replica {name} cannot be reached for the moment")
            return
        if isinstance(error, Failed):
            reason = f"one of its processes failed: {error.reason.splitlines()[0]}"
        else:
            reason = first_line(fault(error, f"replica {name}"))
        self.events.append(ReplicaLost(name, reason))
        # A machine that dies takes all its replicas along: that says nothing about them.
        self.roster.gone(name, reason, fault="its node has died" not in str(error))

    def _prepare(self, resume: bool) -> Prepared:
        self._resume = resume
        require(self.config, socket.gethostname())
        url = f"http://{socket.gethostname()}:{self.exporter.serve(self.config.metrics_port)}/metrics"
        self._sweep()
        self._note_state("starting", metrics_url=url)
        self.roster.gather()
        first = self._first
        examples = self.config.per_direction_batch_size * self.config.microbatches
        self.journal.begin(self.ledger.next_step, url, examples * first.tokens_per_example, first.trainable)
        # Nothing that was made of commits that are not there (any more) may be taken for true.
        self._sweep(after=self.ledger.next_step)
        self.journal.rewound(self.ledger.next_step)
        for text in (*self.ledger.warnings, *first.identity.verdict.reasons):
            self.journal.warn(text)
        self.journal.say(f"{'resumed' if resume else 'started'} at step {self.ledger.next_step}")
        self._note_state("running", metrics_url=url)
        rules = settings(self.config, first.eval_shards)
        self.state = initial_state(
            rules,
            self.ledger.next_step,
            self.ledger.head,
            skipped=self._skipped(),
            recent=self._recent(rules.optimizer.reach),
            now=time.monotonic(),
        )
        return Prepared(first, self.roster.count(SlotPhase.ACTIVE), self.ledger.next_step, url)

    def _open_ledger(self, first: Introduction) -> Ledger:
        if not self._resume:
            return Ledger.create(self.folder.ledger, dict(first.header))
        ledger = Ledger.open(self.folder.ledger, repair=True)
        try:
            check_header(ledger.header, first.identity, self.config, str(self.folder.config_path))
        except BaseException:
            ledger.close()
            raise
        return ledger

    def _sweep(self, after: int | None = None) -> None:
        """Tidy the snapshots; none that should be gone is ever used, so one that cannot be deleted is no harm."""
        try:
            sweep(self.folder.snapshots_of(self.config), after)
        except StoreError as error:
            self.journal.warn(f"the snapshots cannot be tidied: {error}")

    def _skipped(self) -> int:
        """Null commits in a row at the end of the ledger."""
        last = self._recent(self.config.max_skipped_steps)
        return sum(1 for _ in takewhile(lambda commit: not commit.applied, reversed(last)))

    def _recent(self, count: int) -> tuple[Commit, ...]:
        """The last commits of the ledger, or all if it has no more."""
        return tuple(self.ledger.commits(max(0, self.ledger.next_step - count)))

    def _conclude(self, finish: Finish) -> None:
        """Write down how the run ended, as far as it can be; not in a folder that is another coordinator's by now."""
        if not self.lock.lost:
            with suppress(OSError):
                if finish.digest is not None and finish.reason == "stopped":
                    self.journal.digest(finish.step, finish.digest)
                self.journal.say(f"{finish.reason}: {finish.text}")
                self._note_state(finish.reason, step=finish.step, text=finish.text)
        # Trackers may take a while for their last reports, and nobody is to pay for idle replicas meanwhile.
        self.roster.close()
        size = sum(path.stat().st_size for path in self.folder.ledger.iterdir())
        self.journal.finished(size, None if self.lock.lost else finish.reason)

    def _note_state(self, state: str, **more: object) -> None:
        """Write down for other processes who runs this run and where, or how it ended."""
        context = ray.get_runtime_context()
        who = {"host": socket.gethostname(), "pid": os.getpid(), "ray": context.gcs_address}
        who["auth"] = os.environ.get("RAY_AUTH_MODE")
        at = datetime.now(timezone.utc).isoformat(timespec="seconds")
        trainable = self.journal.progress.trainable
        self.folder.write_state({"state": state, "at": at, **who, "trainable": trainable, **more})

    def _shut(self) -> None:
        """Let everything go, whatever fails; the run can be resumed from here on."""
        with ExitStack() as stack:
            stack.callback(self.lock.release)
            stack.callback(self.exporter.close)
            stack.callback(self.journal.close)
            if self._ledger is not None:
                stack.callback(self._ledger.close)
            stack.callback(self.roster.close)


def actor_name(run: str) -> str:
    """Name of a run's coordinator among Ray's actors."""
    return f"run:{run}"
