"""The actor around a replica: loads the model and the data, shows its identity, runs work items."""

from __future__ import annotations

import logging
import math
import os
import resource
import time
from dataclasses import dataclass

import psutil
import ray
import torch
from torch import nn

from zoray.config import RunConfig, Zero3Memory
from zoray.errors import ResourceError, ZorayError
from zoray.identity import Identity, identify, ledger_header, texts_of
from zoray.memory.shortage import explain, out_of_memory
from zoray.memory.world import Meeting, form, lost_touch
from zoray.models import Make, check_lengths, check_tokens, load_placed, load_tokenizer, selection
from zoray.partitioned import shape_of
from zoray.probe import Sign
from zoray.protocol import (
    Answer,
    DigestValue,
    EvalSums,
    Failed,
    Item,
    Kind,
    Payload,
    ProbeScalars,
    Refused,
    SideLoss,
    decode_request,
    encode_answer,
    lacking,
)
from zoray.replica import Replica
from zoray.snapshot import found, load_newest, save
from zoray.tasks import batch_for, load_task

_SIGNS: dict[Kind, Sign] = {Kind.PLUS: 1, Kind.CENTRE: 0, Kind.MINUS: -1}
"""Where the loss is taken of an evaluation that makes a probe together with another."""

_NEWEST = 16
"""Snapshots a joiner chooses from: an older one would hardly be taken."""


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a replica says of itself when it has loaded the model.

    Attributes:
        identity: compared with that of the other replicas and of the ledger.
        header: the ledger's header, should this be a new run.
        weights, trainable: number of weights of the model, and of those that are trained.
        bytes_per_weight: size of a weight.
        eval_shards, eval_examples, tokens_per_example: of the task.
        warnings: what the user should know about the model and the data.
        host, pid: of the process.
        pids: of all the replica's processes.
    """

    identity: Identity
    header: dict[str, object]
    weights: int
    trainable: int
    bytes_per_weight: int
    eval_shards: int
    eval_examples: int
    tokens_per_example: float
    warnings: tuple[str, ...]
    host: str
    pid: int
    pids: tuple[int, ...] = ()


class ReplicaActor:
    """One replica in one process, or one of the processes of a sharded one. A plain class; the fleet makes it remote.

    The processes of a sharded replica are asked for the same things in the same order; only the probes and evaluations
    they run at the same time differ.

    Args:
        name: of the replica, for messages.
        config: of the run.
        snapshots: folder or URI where the run keeps its snapshots.
        rank: of the process among those of the replica.
    """

    def __init__(self, name: str, config: RunConfig, snapshots: str, rank: int = 0) -> None:
        torch.set_num_threads(config.threads_per_replica)
        self.name, self.config, self.snapshots, self.rank = name, config, snapshots, rank
        self._who = f"replica {name}" + (f", process {rank} of {config.shards}" if config.shards > 1 else "")
        self._run, self._head = "", b""
        self._heard = _Heard()
        logging.getLogger("zoray").addHandler(self._heard)

    def meet(self) -> str | None:
        """Open the place where the replica's processes find each other, if they must; asked of the first of them."""
        if not isinstance(self.config.memory, Zero3Memory):
            return None
        self._meeting = Meeting(str(ray.util.get_node_ip_address()))  # type: ignore[no-untyped-call]
        return self._meeting.place

    def introduce(self, meeting: str | None = None) -> Introduction:
        """Load the model and the data and prove the paths of the forward, on the run's own first batch.

        Args:
            meeting: where the processes of a sharded replica find each other.

        Raises:
            ZorayError: the model, the data or the configuration do not fit each other, or there is too little memory.
        """
        config, doing = self.config, "loading the model"
        try:
            if meeting is not None:
                form(meeting, self.rank, config.shards, accelerator=config.gpus_per_replica > 0)
            model, memory = self._load()
            doing = "its first forwards"
            self.replica = Replica(
                model,
                config.seed,
                direction=config.direction.kind,
                rank=config.direction.rank,
                texts=texts_of(self.task, config),
                signs=config.signs,
                head=config.head,
                estimator=config.estimator,
                objective=self.task.objective,
                selection=selection(config),
                memory=memory,
            )
            self.replica.prove(self._batch(Item(Kind.PROBE, 0)), config.epsilon)
        except Exception as error:
            if out_of_memory(error):
                batched = None if doing == "loading the model" else config.proved_signs != "sequential"
                raise explain(error, config, f"{self._who}, {doing}", batched) from error
            if (alone := self._alone(error)) is not None:
                raise alone from error
            raise
        identity = identify(self.replica, self.task.digest, config)
        sizes = [math.prod(shape_of(p)) for p in model.parameters()]
        return Introduction(
            identity=identity,
            header=ledger_header(config, identity, self.task),
            weights=sum(sizes),
            trainable=self.replica.layout.numel,
            bytes_per_weight=next(model.parameters()).element_size(),
            eval_shards=self.task.eval_shards,
            eval_examples=self.task.eval_size,
            tokens_per_example=self.task.tokens_per_example,
            warnings=(*self.task.warnings, *self._heard.take()),
            host=os.uname().nodename,
            pid=os.getpid(),
        )

    def _load(self) -> tuple[nn.Module, Make]:
        config = self.config
        self.task = load_task(config, load_tokenizer(config))
        task = self.task
        model, memory = load_placed(config, self.name, num_labels=task.num_labels, id2label=task.id2label)
        check_lengths(config, model)
        check_tokens(task, model)
        self.device = torch.device("cuda" if config.gpus_per_replica > 0 else "cpu")
        return model, memory

    def _alone(self, error: Exception) -> ResourceError | None:
        """What to say when another process of the replica is gone; None if an error means something else."""
        if self.config.shards == 1 or not lost_touch(error):
            return None
        return ResourceError(
            f"{self._who} has lost the others: {error}",
            where="memory",
            advice="one of them has died: its log says why; the replica is built anew",
        )

    def find_snapshots(self) -> tuple[dict[int, str | None], tuple[str, ...]]:
        """The newest snapshots of the run, by step, with the digest each says it has (hex); and warnings.

        The coordinator does not look itself: it would wait for a store that does not answer, and the run with it.
        """
        return found(self.snapshots, _NEWEST), self._heard.take()

    def join(self, genesis: bytes, run: str, known: dict[int, bytes]) -> tuple[int, tuple[str, ...]]:
        """Take part in a run; returns the step of the weights (of a snapshot if there is a usable one) and warnings.

        Args:
            genesis: hash of the ledger's header, 32 bytes.
            run: digest of the ledger's header, which binds snapshots to the run.
            known: steps whose snapshots may be used, with the hash of the last commit in each.
        """
        self._run = run
        self._head = load_newest(self.snapshots, self.replica, run, known) or genesis
        return self.replica.step, self._heard.take()

    def catch_up(self, records: bytes) -> int:
        """Apply the commits among `records` that the weights lack, each checked against the chain; returns their step.

        Raises:
            LedgerError: a record is damaged, or does not follow what was applied before.
        """
        self._advance(records)
        return self.replica.step

    def _advance(self, records: bytes) -> None:
        commits = list(lacking(records, self.replica.step, self._head))
        if commits:
            self.replica.apply(commits)
            self._head = commits[-1].hash

    def work(self, request: bytes) -> bytes:
        """Apply the commits that came along, run the item, answer: see `zoray.protocol.wire`.

        What goes wrong with the item itself is an answer too; the coordinator decides what becomes of it.
        """
        item, records = decode_request(request)
        try:
            started = time.perf_counter()
            self._advance(records)
            applied = time.perf_counter() - started
            if self.replica.step != item.step:
                reason = "a commit is missing" if self.replica.step < item.step else "it is past that step"
                return encode_answer(Refused(self.name, item, self.replica.step, reason))
            return encode_answer(Answer(self.name, item, self._run_item(item, applied)))
        except (ZorayError, RuntimeError, OSError, MemoryError, ValueError) as error:
            logging.getLogger(__name__).exception("%s", item)
            if (alone := self._alone(error)) is not None:
                # That says nothing about the item: it is no answer, and another replica will give one.
                raise alone from error
            if self.replica.torn:
                # Nor does that; and whatever this replica is asked for next, it has no weights for it.
                text = f"{self._who} broke off in an update: {error}"
                raise ResourceError(text, where="memory", advice="the replica is built anew") from error
            if out_of_memory(error):
                verdict = self.replica.verdict
                return self._failed(item, explain(error, self.config, self._who, verdict is None or verdict.batched))
            return self._failed(item, error)

    def _failed(self, item: Item, error: Exception) -> bytes:
        return encode_answer(Failed(self.name, item, f"{type(error).__name__}: {error}"))

    def memory(self) -> dict[str, int]:
        """Bytes this process takes: `resident` now, `peak` so far, and of an accelerator what it has `reserved`."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        sizes = {"resident": psutil.Process().memory_info().rss, "peak": peak}
        if self.config.gpus_per_replica > 0:
            sizes["reserved"] = torch.cuda.memory_reserved()
        return sizes

    def _run_item(self, item: Item, applied: float) -> Payload:
        if item.kind is Kind.PROBE:
            started = time.perf_counter()
            result = self.replica.probe(
                item.step, item.direction, self._batch(item), self.config.epsilon, item.microbatch
            )
            took = time.perf_counter() - started
            return ProbeScalars(result.projected_gradient, result.loss, applied, took, result.contrast)
        if item.kind.probing:
            started = time.perf_counter()
            sign = _SIGNS[item.kind]
            found = self.replica.side(item.step, item.direction, self._batch(item), self.config.epsilon, sign)
            return SideLoss(found.loss, applied, time.perf_counter() - started, found.contrast)
        if item.kind is Kind.EVAL:
            return self._evaluate(item.shard)
        if item.kind is Kind.SNAPSHOT:
            keep = self.config.snapshots_kept
            return DigestValue(save(self.snapshots, self.replica, self._head, self._run, keep))
        return DigestValue(self.replica.digest())

    def _batch(self, item: Item) -> dict[str, torch.Tensor]:
        batch = batch_for(self.task, self.config, item.step, item.direction, item.microbatch)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _evaluate(self, shard: int) -> EvalSums:
        batch = {name: tensor.to(self.device) for name, tensor in self.task.eval_batch(shard).items()}
        return EvalSums(*self.replica.evaluate(batch).summary())


class _Heard(logging.Handler):
    """Keeps the core's warnings, which nobody would read in the log of an actor's process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())

    def take(self) -> tuple[str, ...]:
        """What was said since the last time."""
        texts, self._texts = tuple(self._texts), []
        return texts
