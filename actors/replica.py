"""The actor around a replica: loads the model and the data, shows its identity, runs work items."""

from __future__ import annotations

import logging
import os
import resource
import time
from dataclasses import dataclass

import psutil
import torch

from zoray.config import RunConfig
from zoray.errors import ResourceError, ZorayError
from zoray.identity import Identity, identify, ledger_header
from zoray.models import check_lengths, check_tokens, load_model, load_tokenizer
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
    decode_request,
    encode_answer,
    lacking,
)
from zoray.replica import Replica
from zoray.snapshot import found, load_newest, save
from zoray.tasks import batch_for, load_task

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
        host, pid: of its process.
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


class ReplicaActor:
    """One replica in one process. A plain class; the fleet makes it remote.

    Args:
        name: of the replica, for messages.
        config: of the run.
        snapshots: folder or URI where the run keeps its snapshots.
    """

    def __init__(self, name: str, config: RunConfig, snapshots: str) -> None:
        torch.set_num_threads(config.threads_per_replica)
        self.name, self.config, self.snapshots = name, config, snapshots
        self._run, self._head = "", b""
        self._heard = _Heard()
        logging.getLogger("zoray").addHandler(self._heard)

    def introduce(self) -> Introduction:
        """Load the model and the data and prove the paths of the forward, on the run's own first batch.

        Raises:
            ZorayError: the model, the data or the configuration do not fit each other.
        """
        config = self.config
        try:
            tokenizer = load_tokenizer(config)
            self.task = load_task(config, tokenizer)
            model = load_model(config, num_labels=self.task.num_labels, id2label=self.task.id2label)
            check_lengths(config, model)
            check_tokens(self.task, model)
            if config.gpus_per_replica > 0:
                model.to("cuda")
            self.device = next(model.parameters()).device
            self.replica = Replica(
                model,
                config.seed,
                direction=config.direction.kind,
                rank=config.direction.rank,
                signs=config.signs,
                head=config.head,
            )
            self.replica.prove(self._batch(Item(Kind.PROBE, 0)), config.epsilon)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ResourceError(
                f"There is not enough memory for a replica: {error}",
                where=f"replica {self.name}",
                advice="use fewer replicas per machine, a shorter dtype or a smaller per_direction_batch_size",
            ) from error
        identity = identify(self.replica, self.task.digest, config)
        sizes = [p.numel() for p in model.parameters()]
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
            return ProbeScalars(result.projected_gradient, result.loss, applied, time.perf_counter() - started)
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
