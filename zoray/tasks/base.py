"""What a run learns from: examples that become batches, for probes and for evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from zoray.errors import DataError
from zoray.objective import ACCURACY, Objective, Score, load_function
from zoray.tasks.store import TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zoray.config import RunConfig

IGNORED_LABEL = -100
"""Label of positions that do not count in the loss, as in `torch` and `transformers`."""

_PAD_TO = 8

Batch = dict[str, torch.Tensor]
"""input_ids and attention_mask (rows, width), labels (rows, width) or (rows,); all int64 on the CPU."""


class Task(ABC):
    """A data set with its evaluation set, tokenised; `batch` and `eval_batch` are pure functions of their arguments.

    Attributes:
        num_labels: classes of a classification, else None.
        id2label: their names where the data name them, else None.
        warnings: what the user should know about the data (examples that were cut, ...).
        objective: what probes minimise and evaluations measure.
    """

    kind: ClassVar[str]
    num_labels: int | None = None
    id2label: dict[int, str] | None = None

    def __init__(self, config: RunConfig, train: TokenStore, held_out: TokenStore | None, pad_id: int) -> None:
        self.warnings: list[str] = [f"{config.task.train}: {text}" for text in train.facts["warnings"]]
        if held_out is not None:
            self.warnings += [f"{config.task.eval}: {text}" for text in held_out.facts["warnings"]]
        self._train = train
        self._held_out = held_out
        self._pad_id = pad_id
        self._max_length = config.task.max_length
        self._eval_batch_size = config.per_device_eval_batch_size
        self._max_eval_samples = config.max_eval_samples
        self.objective = Objective(score_of(config.objective))

    @abstractmethod
    def _collate(self, store: TokenStore, indices: Sequence[int]) -> Batch:
        """The examples of a store as one batch."""

    def _count(self, store: TokenStore) -> int:
        """Examples of a store."""
        return len(store)

    @property
    def train_size(self) -> int:
        """Training examples (packed sequences, or rows)."""
        return self._count(self._train)

    @property
    def eval_size(self) -> int:
        """Held-out examples that are evaluated; 0 without an evaluation set."""
        if self._held_out is None:
            return 0
        count = self._count(self._held_out)
        return min(count, self._max_eval_samples or count)

    @property
    def eval_shards(self) -> int:
        """Batches of an evaluation: they depend on the data and the configuration, never on the number of replicas."""
        return -(-self.eval_size // self._eval_batch_size)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the tokenised training set: replicas with equal digests see equal batches."""
        return self._train.digest

    @property
    def largest_token(self) -> int:
        """The largest token of both sets; the model needs an embedding for it."""
        stores = [self._train] if self._held_out is None else [self._train, self._held_out]
        return max(self._pad_id, *(int(store.facts["largest_token"]) for store in stores))

    @property
    def tokens_per_example(self) -> float:
        """Mean tokens of a training example, padding not counted."""
        return float(self._train.facts["tokens"] / self.train_size)

    def texts(self, run_seed: int) -> Batch | None:
        """Training examples, without labels, whose forward tells the inputs of layers (see `zoray.inputs`).

        None where a language model is trained as such: random tokens do as well for it.
        """
        return None

    def batch(self, sample_ids: npt.NDArray[np.int64] | Sequence[int]) -> Batch:
        """The training examples of those indices, in that order."""
        return self._collate(self._train, [int(each) for each in sample_ids])

    def eval_batch(self, shard: int) -> Batch:
        """Batch number `shard` of the evaluation, 0 <= shard < eval_shards; the last one may be smaller."""
        if self._held_out is None or not 0 <= shard < self.eval_shards:
            raise IndexError(f"evaluation batch {shard} of {self.eval_shards}")
        start = shard * self._eval_batch_size
        return self._collate(self._held_out, range(start, min(start + self._eval_batch_size, self.eval_size)))

    def _pad(self, rows: Sequence[npt.NDArray[np.int32]]) -> Batch:
        """input_ids and attention_mask, padded on the right to the longest row, rounded up within max_length."""
        longest = max(len(row) for row in rows)
        width = max(longest, min(-(-longest // _PAD_TO) * _PAD_TO, self._max_length))
        ids = np.full((len(rows), width), self._pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def score_of(objective: str) -> Score | None:
    """The score that a configuration names; None for the loss, and for those that a kind of task has of its own.

    Raises:
        ConfigError: a function that cannot be imported.
    """
    if ":" in objective:
        return load_function(objective)
    return ACCURACY if objective == "accuracy" else None


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: the tokenizer's own, else its end of text, else 0.

    Any token would do: padding is masked out of the attention and has no label.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def require_examples(count: int, path: str) -> None:
    """Raises DataError if a data set has no rows."""
    if count == 0:
        raise DataError("The data set is empty.", where=path, advice="Check that the right files are named.")
