"""Classification by label words and multiple choice: which candidate does a causal language model find most likely?

As in MeZO (Malladi et al. 2023, after Brown et al. 2020): each candidate is a row of its own, prompt and candidate, and
is measured by the mean log-likelihood of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zoray.config import MultipleChoiceTask, PromptedTask, RunConfig
from zoray.config.prompt import expression, prompt
from zoray.config.tasks import label_text
from zoray.errors import DataError
from zoray.objective import Candidates
from zoray.tasks.base import IGNORED_LABEL, Batch, Task, padding_id, score_of
from zoray.tasks.store import Facts, Ints, TokenBatch, TokenStore, fingerprint, open_store
from zoray.tasks.worded import Row, Source, answered, prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_START, _CANDIDATE, _CORRECT = "loss_start", "candidate", "correct"


class CandidatesTask(Task):
    """`kind: classification` with a prompt, and `kind: multiple_choice`.

    A batch has a row for each candidate of each example: `labels` (rows, T) are the candidate's tokens, `candidate`
    (rows,) its number in the example, `correct` (rows,) whether it is right. With `loss: answer`, batches of probes
    have the first right candidate of each example alone, as number 0, unless the objective is another than the loss.
    """

    kind = "candidates"

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, final: bool = False) -> None:
        task = config.task
        assert isinstance(task, PromptedTask | MultipleChoiceTask)
        train = Source(task, task.train, training=True)
        stores = _open(task, train, tokenizer, dev=False), _held_out(task, train, tokenizer, final)
        self._first = {
            id(store): np.flatnonzero(store.column(_CANDIDATE) == 0) for store in stores if store is not None
        }
        super().__init__(config, *stores, padding_id(tokenizer))
        # Of each example, the first row that is right.
        right = np.flatnonzero(stores[0].column(_CORRECT))
        self._right = right[np.searchsorted(right, self._first[id(stores[0])])]
        self._answers = task.loss == "answer" and config.differentiable
        self.objective = Candidates(task.loss, score_of(config.objective))

    def _count(self, store: TokenStore) -> int:
        return len(self._first[id(store)])

    @property
    def tokens_per_example(self) -> float:
        """Mean tokens that a probe reads for an example, padding not counted."""
        whole = super().tokens_per_example
        return whole * self.train_size / len(self._train) if self._answers else whole

    def batch(self, sample_ids: Ints | Sequence[int]) -> Batch:  # type: ignore[override]
        """The training examples of those indices, in that order."""
        indices = [int(each) for each in sample_ids]
        if not self._answers:
            return self._collate(self._train, indices)
        found = self._rows(self._train, [int(self._right[i]) for i in indices])
        return {**found, "candidate": torch.zeros_like(found["candidate"])}

    def _collate(self, store: TokenStore, indices: Sequence[int]) -> Batch:
        first = np.append(self._first[id(store)], len(store))
        return self._rows(store, [row for i in indices for row in range(first[i], first[i + 1])])

    def _rows(self, store: TokenStore, rows: Sequence[int]) -> Batch:
        batch = self._pad([store.tokens(row) for row in rows])
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
        starts, numbers, right = (
            torch.tensor([store.extra(name, row) for row in rows]) for name in (_START, _CANDIDATE, _CORRECT)
        )
        labels[torch.arange(labels.shape[1]) < starts[:, None]] = IGNORED_LABEL
        return {**batch, "labels": labels, "candidate": numbers, "correct": right}


def _held_out(
    task: PromptedTask | MultipleChoiceTask, train: Source, tokenizer: PreTrainedTokenizerBase, final: bool
) -> TokenStore | None:
    if task.dev_samples is not None and not final:
        return _open(task, train, tokenizer, dev=True)
    return None if task.eval is None else _open(task, Source(task, task.eval, training=False), tokenizer, dev=False)


def _open(
    task: PromptedTask | MultipleChoiceTask, source: Source, tokenizer: PreTrainedTokenizerBase, *, dev: bool
) -> TokenStore:
    def rows(facts: Facts) -> Iterator[TokenBatch]:
        cut = count = 0
        for chunk in source.rows(dev=dev):
            batch, lost = _tokenize(task, chunk, tokenizer)
            count, cut = count + len(chunk), cut + lost
            yield batch
        if cut:
            facts["warnings"].append(f"prompts of {cut} of {count} examples were cut to task.max_length.")

    return open_store(fingerprint(source.files, tokenizer, source.keys(dev=dev)), rows, (_START, _CANDIDATE, _CORRECT))


def _tokenize(
    task: PromptedTask | MultipleChoiceTask, rows: list[Row], tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenBatch, int]:
    """The candidates of some rows, and how many rows have prompts that were cut."""
    find = partial(_words, task) if isinstance(task, PromptedTask) else partial(_choices, task)
    offered = [find(*row) for row in rows]
    before, texts, places = [], [], []
    batch = TokenBatch([], {_START: [], _CANDIDATE: [], _CORRECT: []})
    for text, (candidates, right), (_, where) in zip(prompts(task, rows), offered, rows, strict=True):
        before += [text] * len(candidates)
        texts += candidates
        places += [where] * len(candidates)
        batch.extras[_CANDIDATE] += range(len(candidates))
        batch.extras[_CORRECT] += [int(i in right) for i in range(len(candidates))]
    found = answered(tokenizer, task, before, texts, places)
    batch.tokens.extend(each.tokens for each in found)
    batch.extras[_START].extend(each.start for each in found)
    return batch, len({place for place, each in zip(places, found, strict=True) if each.cut})


def _words(task: PromptedTask, row: dict[str, Any], where: str) -> tuple[list[str], set[int]]:
    """The label words, and the number of the right one."""
    label = label_text(row[task.label_column])
    known = list(task.label_words)
    if label not in known:
        raise DataError(
            f"The label {label!r} has no word; there are words for {', '.join(known)}.",
            where=f"{where}, column {task.label_column}",
            advice="Give it one in task.label_words.",
        )
    return list(task.label_words.values()), {known.index(label)}


def _choices(task: MultipleChoiceTask, row: dict[str, Any], where: str) -> tuple[list[str], set[int]]:
    """What each choice continues the prompt with, and the numbers of the right ones."""
    if isinstance(task.choices, str):
        choices = expression(task.choices).value(row, where)
    else:
        choices = [expression(each).value(row, where) for each in task.choices]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(each, str) for each in choices):
        raise DataError(f"task.choices gives {choices!r}, not a list of texts.", where=where, advice="Correct it.")
    right = _right(choices, expression(task.answer).value(row, where))
    if not right:
        raise DataError(
            f"task.answer is none of the {len(choices)} choices.",
            where=where,
            advice="Correct the data or task.answer.",
        )
    return [prompt(task.choice_text).render({**row, "choice": each}, where) for each in choices], right


def _right(choices: list[str], answer: Any) -> set[int]:
    """The numbers of the choices that an answer names: by number or by text, one or several."""
    if isinstance(answer, list):
        return set[int]().union(*(_right(choices, each) for each in answer))
    if isinstance(answer, str) and answer not in choices and answer.isdecimal():
        answer = int(answer)
    if isinstance(answer, int):
        return {int(answer)} & set(range(len(choices)))
    return {i for i, choice in enumerate(choices) if choice == answer}
