"""Classification by label words and multiple choice: which candidate does a causal language model find most likely?

As in MeZO (Malladi et al. 2023, after Brown et al. 2020), each candidate is put behind the prompt and measured by the
mean log-likelihood of its tokens. Candidates of one token are all read off one row: the same numbers, for a fraction of
the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zoray.config import MultipleChoiceTask, PromptedTask, RunConfig
from zoray.config.prompt import expression, prompt
from zoray.errors import DataError
from zoray.objective import Candidates
from zoray.tasks.base import IGNORED_LABEL, Batch, Task, padding_id, score_of
from zoray.tasks.masked import fill
from zoray.tasks.store import Facts, Ints, TokenBatch, TokenStore, fingerprint, open_store
from zoray.tasks.worded import Row, Source, answered, prompts, word_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_START, _CANDIDATE, _CORRECT = "loss_start", "candidate", "correct"
_PLAIN = ("input_ids", "attention_mask", "labels")


class CandidatesTask(Task):
    """`kind: classification` with a prompt, and `kind: multiple_choice`.

    Where every candidate of a data set is one token, an example is one row, that of the first right candidate: `labels`
    (rows, T) have its token, `words` (rows, candidates) the tokens of all in its place, `right` (rows,) its number.
    Else it has a row for each candidate: `labels` are the candidate's tokens, `candidate` (rows,) its number in the
    example, `correct` (rows,) whether it is right. With `loss: answer`, batches of probes have the first right
    candidate of each example alone, as number 0, unless the objective is another than the loss.

    For a masked language model the place of the words is that of the mask, which the model is given there.
    """

    kind = "candidates"

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, final: bool = False) -> None:
        task = config.task
        assert isinstance(task, PromptedTask | MultipleChoiceTask)
        source = Source(task, task.train, training=True)
        masked = task.architecture == "masked"
        self._mask = tokenizer.mask_token_id if masked else None
        train, held_out = _open(task, source, tokenizer, dev=False), _held_out(task, source, tokenizer, final)
        self._examples = {id(store): _Examples(store, masked) for store in (train, held_out) if store is not None}
        super().__init__(config, train, held_out, padding_id(tokenizer))
        self._answers = task.loss == "answer" and config.differentiable
        self.objective = Candidates(task.loss, score_of(config.objective))

    def _count(self, store: TokenStore) -> int:
        return len(self._examples[id(store)].first)

    @property
    def tokens_per_example(self) -> float:
        """Mean tokens that a probe reads for an example, padding not counted."""
        one_row = self._answers or self._examples[id(self._train)].words is not None
        return super().tokens_per_example * (self.train_size / len(self._train) if one_row else 1)

    def batch(self, sample_ids: Ints | Sequence[int]) -> Batch:  # type: ignore[override]
        """The training examples of those indices, in that order."""
        indices, examples = [int(each) for each in sample_ids], self._examples[id(self._train)]
        if not self._answers or examples.words is not None:
            return self._collate(self._train, indices)
        found = self._rows(self._train, [int(examples.right[i]) for i in indices])
        return {**found, "candidate": torch.zeros_like(found["candidate"])}

    def _collate(self, store: TokenStore, indices: Sequence[int]) -> Batch:
        examples = self._examples[id(store)]
        if examples.words is None:
            ends = np.append(examples.first[1:], len(store))
            return self._rows(store, [row for i in indices for row in range(examples.first[i], ends[i])])
        found = self._rows(store, [int(examples.right[i]) for i in indices])
        words = torch.from_numpy(examples.words[np.array(indices, dtype=np.int64)].astype(np.int64))
        return {**{name: found[name] for name in _PLAIN}, "words": words, "right": found["candidate"]}

    def _rows(self, store: TokenStore, rows: Sequence[int]) -> Batch:
        batch = self._pad([store.tokens(row) for row in rows])
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
        starts, numbers, right = (
            torch.tensor([store.extra(name, row) for row in rows]) for name in (_START, _CANDIDATE, _CORRECT)
        )
        places = torch.arange(labels.shape[1])
        labels[places < starts[:, None]] = IGNORED_LABEL
        if self._mask is not None:
            labels[places > starts[:, None]] = IGNORED_LABEL
            batch["input_ids"][places == starts[:, None]] = self._mask
        return {**batch, "labels": labels, "candidate": numbers, "correct": right}


class _Examples:
    """Which rows of a store belong to which example.

    Attributes:
        first: the first row of each.
        right: the first row of each that is right.
        words: the token that each candidate is, shape (examples, candidates), if each is one token in the same place
            (the last of its row, or wherever the mask is), and one of them is right.
    """

    def __init__(self, store: TokenStore, masked: bool) -> None:
        starts = store.column(_START)
        self.first = np.flatnonzero(store.column(_CANDIDATE) == 0)
        right = np.flatnonzero(store.column(_CORRECT))
        self.right = right[np.searchsorted(right, self.first)]
        count = len(store) // len(self.first)
        self.words: Ints | None = None
        if len(right) == len(self.first) and (np.diff([*self.first, len(store)]) == count).all():
            alike = (starts.reshape(-1, count) == starts[self.first, None]).all()
            if masked or (alike and (starts == store.lengths - 1).all()):
                words = [store.tokens(row)[start] for row, start in enumerate(starts)]
                self.words = np.array(words).reshape(-1, count)


def _held_out(
    task: PromptedTask | MultipleChoiceTask, train: Source, tokenizer: PreTrainedTokenizerBase, final: bool
) -> TokenStore | None:
    if task.dev_samples is not None and not final:
        return _open(task, train, tokenizer, dev=True)
    return None if task.eval is None else _open(task, Source(task, task.eval, training=False), tokenizer, dev=False)


def _open(
    task: PromptedTask | MultipleChoiceTask, source: Source, tokenizer: PreTrainedTokenizerBase, *, dev: bool
) -> TokenStore:
    tokenize: Callable[..., tuple[TokenBatch, int]] = fill if task.architecture == "masked" else _tokenize

    def rows(facts: Facts) -> Iterator[TokenBatch]:
        cut = count = 0
        for chunk in source.rows(dev=dev):
            batch, lost = tokenize(task, chunk, tokenizer)
            count, cut = count + len(chunk), cut + lost
            yield batch
        if cut:
            facts["warnings"].append(f"prompts of {cut} of {count} examples were cut to task.max_length.")

    return open_store(fingerprint(source.files, tokenizer, source.keys(dev=dev)), rows, (_START, _CANDIDATE, _CORRECT))


def _tokenize(
    task: PromptedTask | MultipleChoiceTask, rows: list[Row], tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenBatch, int]:
    """The candidates of some rows, and how many rows have prompts that were cut."""
    find = partial(word_of, task) if isinstance(task, PromptedTask) else partial(_choices, task)
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
