"""The actor around a replica of a study: it goes from one trial to another by a replay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from actors.replica import Introduction, ReplicaActor
from zoray.aggregate import ProbeResult
from zoray.errors import RunError
from zoray.layout import ParamSpec
from zoray.memory.shortage import explain, out_of_memory
from zoray.proof import Verdict
from zoray.protocol import Item, Kind
from zoray.tasks.sampler import permutation
from zoray.tuning import Evaluated, Share
from zoray.tuning.messages import Value

JUDGED = 512
"""Examples that trials are judged on, unless `max_eval_samples` says how many; a rung should cost more than that."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a replica says of itself when it has loaded the model.

    Attributes:
        introduction: as to a run.
        verdicts: the paths of the forward, by epsilon.
        train_examples: of the training set.
        judged: examples of an evaluation.
        shards: batches of it.
    """

    introduction: Introduction
    verdicts: dict[float, Verdict]
    train_examples: int
    judged: int
    shards: int


class Order(NamedTuple):
    """A share of work, and how to get to its weights.

    Attributes:
        epsilon: of the trial.
        genesis: hash of the header of the trial's ledger if the way begins at the base weights, else None.
        records: the commits that are missing.
    """

    share: Share
    epsilon: float
    genesis: bytes | None
    records: bytes


class TrialReplica(ReplicaActor):
    """One replica in one process, which keeps a copy of its trainable weights as they were at the start."""

    def enter(self, epsilons: tuple[float, ...]) -> Entry:
        """Load the model and the data, and prove the paths of the forward for each epsilon.

        Raises:
            ZorayError: as `introduce`.
        """
        introduction = self.introduce()
        self._base = {
            (shard.spec.name, shard.start): shard.values.to("cpu", copy=True) for shard in self.replica.memory.shards()
        }
        self._verdicts = {epsilon: self._prove(epsilon) for epsilon in epsilons}
        examples = sum(len(each) for each in self._batches)
        return Entry(introduction, self._verdicts, self.task.train_size, examples, len(self._batches))

    def share(self, order: Order) -> tuple[Value, ...]:
        """Bring the weights to where they are wanted, and do a share of the work; one value for each part.

        Raises:
            ZorayError: a commit is missing or damaged, or there is too little memory.
        """
        try:
            if order.genesis is not None:
                self._go_back(order.genesis, order.epsilon)
            self._advance(order.records)
            if self.replica.step != order.share.step:
                raise RunError(f"{self._who} is at step {self.replica.step} and was asked for {order.share}.")
            self.config = self.config.model_copy(update={"epsilon": order.epsilon})
            parts = order.share.parts
            if order.share.evaluating:
                return tuple(self._judge(order.share.step, part) for part in parts)
            found = {part: self._probe(order.share.step, part) for part in sorted(parts, key=self._by_batch)}
            return tuple(found[part] for part in parts)
        except Exception as error:
            if out_of_memory(error):
                verdict = self.replica.verdict
                raise explain(error, self.config, self._who, verdict is None or verdict.batched) from error
            raise

    def _go_back(self, genesis: bytes, epsilon: float) -> None:
        """To the base weights, and to the paths that are right with an epsilon."""

        def read(spec: ParamSpec, start: int, stop: int) -> torch.Tensor:
            return self._base[spec.name, start]

        self.replica.load(read, 0)
        self._head = genesis
        # They are the same for every epsilon, as a rule; and a trial does not change its own.
        if self._verdicts.get(epsilon, self.replica.verdict) != self.replica.verdict:
            self._prove(epsilon)

    def _prove(self, epsilon: float) -> Verdict:
        return self.replica.prove(self._batch(Item(Kind.PROBE, 0)), epsilon)

    def _probe(self, step: int, part: int) -> ProbeResult:
        direction, microbatch = divmod(part, self.config.microbatches)
        item = Item(Kind.PROBE, step, direction, microbatch)
        curved = part == 0 and self.config.update_rule.wants_curvature
        return self.replica.probe(step, direction, self._batch(item), self.config.epsilon, microbatch, curved=curved)

    def _by_batch(self, part: int) -> tuple[int, int, int]:
        """Sorts the probes of a batch next to each other: what they share is kept for one batch."""
        direction, microbatch = divmod(part, self.config.microbatches)
        return direction // self.config.directions_per_batch, microbatch, direction

    def _judge(self, step: int, shard: int) -> Evaluated:
        """The losses of one batch of the evaluation, example by example."""
        chosen = self._batches[shard]
        batch = self.task.eval_batch(chosen[0] // self._size) if self.task.eval_shards else self.task.batch(chosen)
        rows = self.replica.evaluate({name: tensor.to(self.device) for name, tensor in batch.items()})
        losses = (rows.sums / rows.counts)[rows.counts > 0].tolist()
        # Training examples may have their right answer alone, beside which nothing could be chosen.
        told = rows.correct is not None and self.task.eval_shards > 0
        return Evaluated(tuple(losses), int(rows.correct.sum()) if told and rows.correct is not None else 0)

    @property
    def _size(self) -> int:
        return self.config.per_device_eval_batch_size

    @cached_property
    def _batches(self) -> list[list[int]]:
        """The examples that trials are judged on, batch by batch.

        They are held-out ones, in batches from all over the data, which may be sorted; or, where there are none, the
        training examples that a run comes to last.
        """
        most, size = self.config.max_eval_samples or JUDGED, self._size
        if total := self.task.eval_shards:
            # What `max_eval_samples` asks for, the task has already.
            count = total if self.config.max_eval_samples else min(total, -(-most // size))
            starts = [i * total // count * size for i in range(count)]
            return [list(range(start, min(start + size, self.task.eval_size))) for start in starts]
        count = min(most, self.task.train_size)
        last = permutation(self.config.seed, self.task.train_size, 0)[-count:].tolist()
        return [last[start : start + size] for start in range(0, count, size)]
