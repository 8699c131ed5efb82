"""Text that a causal language model writes after a prompt: trained on the right answer, measured on what it writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from zoray.config import GenerationTask, RunConfig
from zoray.config.prompt import expression
from zoray.errors import DataError
from zoray.objective import Text
from zoray.tasks.base import IGNORED_LABEL, Batch, Task, padding_id, score_of
from zoray.tasks.metrics import F1, exact
from zoray.tasks.store import Facts, TokenBatch, TokenStore, fingerprint, open_store
from zoray.tasks.worded import Source, answered, prompts, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_START = "loss_start"


class Generation(Task):
    """`kind: generation`.

    A row is prompt, first right answer and `stop`; prompt and padding carry the label -100. Batches that text is
    generated for also have `prompt_ids` and `prompt_mask` (rows, width), padded on the left, and `references`: the
    right answers as JSON in UTF-8, a byte per element, padded with zeros.
    """

    kind = "generation"

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, final: bool = False) -> None:
        task = config.task
        assert isinstance(task, GenerationTask)
        train = Source(task, task.train, training=True)
        held_out = None
        if task.dev_samples is not None and not final:
            held_out = _Stores(task, train, tokenizer, dev=True)
        elif task.eval is not None:
            held_out = _Stores(task, Source(task, task.eval, training=False), tokenizer, dev=False)
        learnt = _Stores(task, train, tokenizer, dev=False)
        self._answers = {id(each.tokens): each.answers for each in (learnt, held_out) if each is not None}
        super().__init__(config, learnt.tokens, None if held_out is None else held_out.tokens, padding_id(tokenizer))
        self._room, self._begin = task.max_length - task.max_new_tokens, tokenizer.bos_token_id
        self._writes = not config.differentiable
        score = F1 if config.objective == "f1" else score_of(config.objective)
        self.objective = Text(Writer(task, tokenizer, self._pad_id), F1, exact, score)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the tokenised training set and its right answers."""
        both = f"{self._train.digest} {self._answers[id(self._train)].digest}"
        return hashlib.sha256(both.encode()).hexdigest()

    def _collate(self, store: TokenStore, indices: Sequence[int]) -> Batch:
        rows, starts = [store.tokens(i) for i in indices], [store.extra(_START, i) for i in indices]
        batch = self._pad(rows)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
        labels[torch.arange(labels.shape[1]) < torch.tensor(starts)[:, None]] = IGNORED_LABEL
        batch["labels"] = labels
        if store is self._train and not self._writes:
            return batch
        kept = [
            shortened(row[:start].tolist(), self._room, self._begin) for row, start in zip(rows, starts, strict=True)
        ]
        # Padding belongs on the left, where text is to follow on the right: the rows are turned round to be padded.
        turned = self._pad([np.array(each[::-1], dtype=np.int32) for each in kept])
        answers = [self._answers[id(store)].tokens(i) for i in indices]
        references = np.zeros((len(answers), max(map(len, answers))), dtype=np.int64)
        for row, answer in enumerate(answers):
            references[row, : len(answer)] = answer
        return {
            **batch,
            "prompt_ids": turned["input_ids"].flip(1),
            "prompt_mask": turned["attention_mask"].flip(1),
            "references": torch.from_numpy(references),
        }


class Writer:
    """Greedy generation, with a cache of keys and values, of a batch's `prompt_ids`.

    Args:
        task: `max_new_tokens` and `stop` decide.
        tokenizer: of the model.
        padding: token that ended rows are filled with.
    """

    def __init__(self, task: GenerationTask, tokenizer: PreTrainedTokenizerBase, padding: int) -> None:
        self.tokenizer, self.stop = tokenizer, task.stop
        last = tokenizer(task.stop, add_special_tokens=False, verbose=False)["input_ids"][-1:]
        ends = [each for each in (*last, tokenizer.eos_token_id) if each is not None]
        self._settings: dict[str, Any] = {
            "max_new_tokens": task.max_new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "use_cache": True,
            "eos_token_id": ends or None,
            "pad_token_id": padding,
        }

    def __call__(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> list[str]:
        """What the model writes after each prompt, up to `stop`, without white space around it."""
        ids = batch["prompt_ids"]
        written = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=batch["prompt_mask"], **self._settings
        )
        texts = self.tokenizer.batch_decode(written[:, ids.shape[1] :].tolist(), skip_special_tokens=True)
        return [text.split(self.stop, 1)[0].strip() for text in texts]


class _Stores:
    """A data set's tokens, and its right answers as JSON in UTF-8, a byte per token."""

    def __init__(self, task: GenerationTask, source: Source, tokenizer: PreTrainedTokenizerBase, *, dev: bool) -> None:
        self._task, self._source, self._dev = task, source, dev
        keys = source.keys(dev=dev)

        def tokens(facts: Facts) -> Iterator[TokenBatch]:
            return self._tokenize(tokenizer, facts)

        self.tokens = open_store(fingerprint(source.files, tokenizer, keys), tokens, (_START,))
        self.answers = open_store(fingerprint(source.files, tokenizer, {**keys, "part": "answers"}), self._spell)

    def _tokenize(self, tokenizer: PreTrainedTokenizerBase, facts: Facts) -> Iterator[TokenBatch]:
        cut = count = 0
        for rows in self._source.rows(dev=self._dev):
            texts = [self._answers(*row)[0] + self._task.stop for row in rows]
            found = answered(tokenizer, self._task, prompts(self._task, rows), texts, [where for _, where in rows])
            yield TokenBatch([each.tokens for each in found], {_START: [each.start for each in found]})
            count, cut = count + len(rows), cut + sum(each.cut for each in found)
        if cut:
            facts["warnings"].append(f"prompts of {cut} of {count} examples were cut to task.max_length.")

    def _spell(self, facts: Facts) -> Iterator[TokenBatch]:
        for rows in self._source.rows(dev=self._dev):
            yield TokenBatch([list(json.dumps(self._answers(*row), ensure_ascii=False).encode()) for row in rows])

    def _answers(self, row: dict[str, Any], where: str) -> list[str]:
        found = expression(self._task.answers).value(row, where)
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not found or not all(isinstance(each, str) and each for each in found):
            raise DataError(
                f"task.answers gives {found!r}, not a text or a list of texts.",
                where=where,
                advice="Leave rows without an answer out of the data, or correct task.answers.",
            )
        return found
