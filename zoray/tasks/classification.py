"""Sequence classification of a text or a pair of texts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from zoray.config import ClassificationTask, RunConfig
from zoray.errors import ConfigError, DataError
from zoray.inputs import POOL, TEXT_TOKENS
from zoray.tasks.base import Batch, Task, padding_id, require_examples
from zoray.tasks.sampler import sample_ids
from zoray.tasks.source import DataFile, find_files, read_rows
from zoray.tasks.store import Facts, TokenBatch, TokenStore, fingerprint, open_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LABEL = "label"
_SECOND = "second_start"
_MOST_CLASSES = 1 << 16


class Classification(Task):
    """`kind: classification`. Labels have shape (rows,).

    Integer labels are class numbers; strings are numbered in sorted order over the training set. A batch of pairs also
    has `token_type_ids` where the tokenizer makes them.
    """

    kind = "classification"

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        task = config.task
        assert isinstance(task, ClassificationTask)
        _require_room(task, tokenizer)
        train = _open_train(task, tokenizer)
        labels: list[str] | None = train.facts["labels"]
        self.num_labels = int(train.facts["num_labels"])
        self.id2label = None if labels is None else dict(enumerate(labels))
        self._token_types = task.text_pair_column is not None and "token_type_ids" in tokenizer.model_input_names
        held_out = None if task.eval is None else _open_eval(task, tokenizer, labels, self.num_labels)
        super().__init__(config, train, held_out, padding_id(tokenizer))

    def texts(self, run_seed: int) -> Batch:
        """The first tokens of the first examples: of random ones a model makes nothing that it makes of these.

        Without the last one of a short text, which is the same special token for all, as a rule.
        """
        order = {"directions": 1, "microbatches": 1, "batch_size": POOL}
        batch = self.batch(sample_ids(run_seed, self.train_size, 0, 0, 0, **order))
        lengths = (batch["attention_mask"].sum(1, keepdim=True) - 1).clamp(1, TEXT_TOKENS)
        texts = {name: values[:, :TEXT_TOKENS] for name, values in batch.items() if name != "labels"}
        texts["attention_mask"] = (torch.arange(texts["input_ids"].shape[1]) < lengths).to(torch.int64)
        return texts

    def _collate(self, store: TokenStore, indices: Sequence[int]) -> Batch:
        batch = self._pad([store.tokens(i) for i in indices])
        if self._token_types:
            starts = torch.tensor([store.extra(_SECOND, i) for i in indices])
            second = (torch.arange(batch["input_ids"].shape[1]) >= starts[:, None]).to(torch.int64)
            batch["token_type_ids"] = second * batch["attention_mask"]
        batch["labels"] = torch.tensor([store.extra(_LABEL, i) for i in indices], dtype=torch.int64)
        return batch


def _require_room(task: ClassificationTask, tokenizer: PreTrainedTokenizerBase) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=task.text_pair_column is not None)
    if special >= task.max_length:
        raise ConfigError(
            f"task.max_length {task.max_length} leaves no room for text beside {special} special tokens.",
            where="task.max_length",
            advice="Raise it.",
        )


def _keys(task: ClassificationTask) -> dict[str, Any]:
    return task.model_dump(include={"kind", "text_column", "text_pair_column", "label_column", "max_length"})


def _open_train(task: ClassificationTask, tokenizer: PreTrainedTokenizerBase) -> TokenStore:
    files = find_files(task.train)

    def rows(facts: Facts) -> Iterator[TokenBatch]:
        labels, num_labels = _scan_labels(task, files, facts)
        facts["labels"], facts["num_labels"] = labels, num_labels
        yield from _tokenize(task, task.train, files, tokenizer, labels, num_labels, facts)

    keys = {**_keys(task), "num_labels": task.num_labels}
    return open_store(fingerprint(files, tokenizer, keys), rows, (_LABEL, _SECOND))


def _open_eval(
    task: ClassificationTask, tokenizer: PreTrainedTokenizerBase, labels: list[str] | None, num_labels: int
) -> TokenStore:
    assert task.eval is not None
    path = task.eval
    files = find_files(path)

    def rows(facts: Facts) -> Iterator[TokenBatch]:
        return _tokenize(task, path, files, tokenizer, labels, num_labels, facts)

    keys = {**_keys(task), "labels": labels, "known_labels": num_labels}
    return open_store(fingerprint(files, tokenizer, keys), rows, (_LABEL, _SECOND))


def _scan_labels(task: ClassificationTask, files: list[DataFile], facts: Facts) -> tuple[list[str] | None, int]:
    """Names of the classes (None if they are numbers) and how many there are."""
    column = task.label_column
    seen: dict[int | str, str] = {}
    for chunk in read_rows(files, {column: "label"}):
        for position, label in enumerate(chunk.columns[column]):
            if label not in seen:
                seen[label] = chunk.where(position, column)
                _same_kind(label, next(iter(seen)), seen[label])
    require_examples(len(seen), task.train)
    if task.num_labels is None and len(seen) == 1:
        raise DataError(f"Every row has the label {next(iter(seen))!r}.", where=f"{task.train}, column {column}")
    names = sorted(label for label in seen if isinstance(label, str))
    if names:
        if task.num_labels not in (None, len(names)):
            raise DataError(
                f"task.num_labels is {task.num_labels}, but there are {len(names)} labels: {_listed(names)}.",
                where=f"{task.train}, column {column}",
                advice="Leave task.num_labels out, or number the labels from 0 in the data.",
            )
        return names, len(names)
    numbers = sorted(label for label in seen if isinstance(label, int))
    if task.num_labels is None and numbers[-1] >= _MOST_CLASSES:
        raise DataError(
            f"The label {numbers[-1]} would make {numbers[-1] + 1} classes.",
            where=seen[numbers[-1]],
            advice="Number the classes from 0, or set task.num_labels.",
        )
    count = task.num_labels or max(2, numbers[-1] + 1)
    if len(numbers) < count and task.num_labels is None:
        facts["warnings"].append(f"The labels go up to {count - 1}, but only {len(numbers)} of them occur.")
    return None, count


def _same_kind(label: int | str, first: int | str, where: str) -> None:
    if type(label) is not type(first):
        raise DataError(
            f"The label is {label!r}, but earlier ones are like {first!r}.",
            where=where,
            advice="Use integers or text throughout.",
        )


def _tokenize(
    task: ClassificationTask,
    path: str,
    files: list[DataFile],
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str] | None,
    num_labels: int,
    facts: Facts,
) -> Iterator[TokenBatch]:
    numbers = None if labels is None else {name: i for i, name in enumerate(labels)}
    # A call with truncation leaves its mark on the tokenizer, which would be saved with an exported model.
    tokenizer = copy.deepcopy(tokenizer)
    count = cut = 0
    for chunk in read_rows(files, task.columns):
        texts = chunk.columns[task.text_column]
        pairs = None if task.text_pair_column is None else chunk.columns[task.text_pair_column]
        encoded = tokenizer(texts, pairs, truncation=True, max_length=task.max_length, verbose=False)
        ids = encoded["input_ids"]
        for position, each in enumerate(ids):
            if not each:
                raise DataError("The text has no tokens.", where=chunk.where(position, task.text_column))
        known = [
            _number(label, numbers, num_labels, chunk.where(position, task.label_column))
            for position, label in enumerate(chunk.columns[task.label_column])
        ]
        yield TokenBatch(ids, {_LABEL: known, _SECOND: [_second_start(encoded, i) for i in range(len(ids))]})
        count += len(ids)
        cut += sum(bool(each.overflowing) for each in encoded.encodings or ())
    require_examples(count, path)
    if cut:
        facts["warnings"].append(f"{cut} of {count} texts were cut to task.max_length {task.max_length} tokens.")


def _number(label: int | str, numbers: Mapping[str, int] | None, num_labels: int, where: str) -> int:
    if numbers is not None:
        if label not in numbers:
            raise DataError(f"The label {label!r} is none of {_listed(list(numbers))}.", where=where)
        return numbers[str(label)]
    if not isinstance(label, int) or not 0 <= label < num_labels:
        raise DataError(
            f"The label {label!r} is not in 0 to {num_labels - 1}.",
            where=where,
            advice="Number the classes from 0, or set task.num_labels.",
        )
    return label


def _second_start(encoded: Any, row: int) -> int:
    """Position of the first token of type 1, or the length where there is none."""
    types = encoded["token_type_ids"][row] if "token_type_ids" in encoded else ()
    return types.index(1) if 1 in types else len(encoded["input_ids"][row])


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return shown + (", ..." if len(names) > 8 else "")
