"""A study: wait for what happens, let the kernel decide, carry its actions out. It holds no weights.

It runs in the process of the command. A commit is on the disk before any replica hears of it, so a study that is killed
goes on where it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from actors.inbox import Inbox
from actors.lock import RunLock
from actors.tuning_pool import Pool
from actors.tuning_replica import Entry, Order
from zoray.commits import HASH_SIZE
from zoray.config import RunConfig
from zoray.errors import ZorayError
from zoray.identity import check_header, check_newcomer, own_header
from zoray.ledger import Ledger
from zoray.tuning import (
    BASE,
    Answered,
    AppendCommit,
    Assign,
    CommitDurable,
    Event,
    Finish,
    Note,
    Plan,
    ReplicaLost,
    ReplicaReady,
    Share,
    ShareFailed,
    StopRequested,
    Study,
    Trial,
    transition,
)
from zoray.tuning.folder import Judged, StudyFolder
from zoray.tuning.messages import Value

_TICK = 0.1


class Tuner:
    """Carries one study out.

    Args:
        config: of the study; learning rate and epsilon are the trials'.
        plan: what is tried.
        folder: of the study, prepared.
        embedded: Ray runs on this machine for this study alone.
        say: is told what a person should know.
        noted: is told each row that is written to `study.jsonl` about a trial.

    Attributes:
        study: where it is; None until the first replica has loaded the model.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        folder: StudyFolder,
        embedded: bool,
        *,
        say: Callable[[str], None],
        noted: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.config, self.plan, self.folder = config, plan, folder
        self.study: Study | None = None
        self.inbox = Inbox()
        self.events: deque[Event] = deque()
        epsilons = tuple(sorted({trial.epsilon for trial in plan.trials}))
        self.pool = Pool(
            config,
            embedded,
            epsilons,
            self.inbox,
            welcome=self._welcome,
            ready=lambda name: self.events.append(ReplicaReady(name)),
            lost=lambda name: self.events.append(ReplicaLost(name)),
            say=say,
        )
        self._say, self._noted = say, noted
        self._trials: dict[str, Trial | None] = {BASE: None, **{trial.name: trial for trial in plan.trials}}
        self._ledgers: dict[str, Ledger] = {}
        self._first: Entry | None = None
        self._stopping = False
        self._open = ExitStack()

    def run(self, shown: Callable[[Study | None], None]) -> Finish:
        """The loop, until the study is over; `shown` is called with where it is after each turn.

        Raises:
            ZorayError: what is wrong with the model, the data, the configuration, the folder or the machines.
        """
        with self._open as stack:
            stack.enter_context(RunLock(self.folder.path))
            stack.callback(self.pool.close)
            self.pool.start()
            while self.study is None or self.study.finish is None:
                if self._stopping:
                    return Finish("stopped", "stopped")
                self.inbox.turn(_TICK)
                self.pool.check()
                self._decide()
                shown(self.study)
            return self.study.finish

    def stop(self) -> None:
        """End the study before its next decision; it can be continued. May be called from a signal handler."""
        self._stopping = True
        self.inbox.put(partial(self.events.append, StopRequested()))

    def _decide(self) -> None:
        while self.events and self.study is not None and self.study.finish is None:
            self.study, actions = transition(self.study, self.events.popleft())
            for action in actions:
                self._carry_out(action)

    def _carry_out(self, action: Any) -> None:
        match action:
            case Assign(name, share, fresh, held):
                self.pool.give(name, self._order(share, fresh, held), partial(self._answered, name, share))
            case AppendCommit(trial, commit):
                self._ledgers[trial].append(commit)
                self.events.append(CommitDurable(trial, commit.step))
            case Note():
                self._noted(self.folder.note(action))

    def _order(self, share: Share, fresh: bool, held: int) -> Order:
        trial = self._trials[share.trial]
        if trial is None:
            return Order(share, self.config.epsilon, bytes(HASH_SIZE) if fresh else None, b"")
        ledger = self._ledgers[share.trial]
        records = ledger.records(held, share.step) if held < share.step else b""
        return Order(share, trial.epsilon, ledger.genesis if fresh else None, records)

    def _answered(self, name: str, share: Share, came: tuple[Value, ...] | ZorayError) -> None:
        if isinstance(came, ZorayError):
            text = came.what if came.advice is None else f"{came.what} ({came.advice})"
            self.events.append(ShareFailed(name, share, text))
        else:
            self.events.append(Answered(name, share, came))

    def _welcome(self, name: str, entry: Entry) -> None:
        """The handshake. The first replica's word is compared with the ledgers, every other one's with the first's."""
        who = f"replica {name}"
        check_newcomer(entry.introduction.identity, self.config, who)
        if self._first is None:
            for text in entry.introduction.warnings:
                self._say(f"warning: {text}")
            self.folder.judge(self._judged(entry))
            for trial in self.plan.trials:
                self._ledgers[trial.name] = self._open.enter_context(self._ledger(trial, entry))
            self._first = entry
            self.study = self.folder.study(self.config, self.plan, self._ledgers)
        self._first.introduction.identity.check(entry.introduction.identity, who)
        for epsilon, verdict in self._first.verdicts.items():
            expected = replace(self._first.introduction.identity, verdict=verdict)
            expected.check(replace(entry.introduction.identity, verdict=entry.verdicts[epsilon]), who)

    def _judged(self, entry: Entry) -> Judged:
        """What trials are judged on, and whether no step trains on it."""
        config = self.config
        batches = config.microbatches * config.batches_of(config.most_directions)
        seen = self.plan.rungs[-1] * batches * config.per_direction_batch_size
        if config.evaluated_in_run:
            return Judged("eval", entry.judged, entry.shards, True)
        return Judged("train", entry.judged, entry.shards, seen <= entry.train_examples - entry.judged)

    def _ledger(self, trial: Trial, entry: Entry) -> Ledger:
        """The ledger of a trial: as it was left, or a new one."""
        config, folder = self.folder.trial_config(self.config, trial), self.folder.trial(trial.name)
        identity = replace(entry.introduction.identity, verdict=entry.verdicts[trial.epsilon])
        if not self.folder.has(trial):
            header = own_header(entry.introduction.header, identity, config)
            self.folder.make_trial(self.config, trial, header).close()
        self._open.enter_context(RunLock(folder.path))
        ledger = Ledger.open(folder.ledger, repair=True)
        for text in ledger.warnings:
            self._say(f"warning: {trial.name}: {text}")
        check_header(ledger.header, identity, config, str(folder.config_path))
        return ledger
