"""Causal language modelling: documents packed into sequences, or completions of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zoray.config import CausalLMTask, RunConfig
from zoray.errors import DataError
from zoray.tasks.base import IGNORED_LABEL, Batch, Task, padding_id, require_examples
from zoray.tasks.source import DataFile, find_files, read_rows
from zoray.tasks.store import Facts, TokenBatch, TokenStore, fingerprint, open_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOSS_START = "loss_start"
_SEQUENCES_PER_BATCH = 1024


class CausalLM(Task):
    """`kind: causal_lm`. Labels are the tokens themselves (the loss shifts them, as in `transformers`).

    Without a prompt column every example is a sequence of exactly `max_length` tokens, cut from the documents joined by
    the end-of-text token; what is left at the end is dropped. With one, every row is an example: prompt, completion,
    end of text; prompt and padding carry the label -100.
    """

    kind = "causal_lm"

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        task = config.task
        assert isinstance(task, CausalLMTask)
        self._prompted = task.prompt_column is not None
        train = _open(task, task.train, tokenizer)
        held_out = None if task.eval is None else _open(task, task.eval, tokenizer)
        super().__init__(config, train, held_out, padding_id(tokenizer))

    def _collate(self, store: TokenStore, indices: Sequence[int]) -> Batch:
        batch = self._pad([store.tokens(i) for i in indices])
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
        if self._prompted:
            starts = torch.tensor([store.extra(_LOSS_START, i) for i in indices])
            labels[torch.arange(labels.shape[1]) < starts[:, None]] = IGNORED_LABEL
        return {**batch, "labels": labels}


def _open(task: CausalLMTask, path: str, tokenizer: PreTrainedTokenizerBase) -> TokenStore:
    files = find_files(path)
    keys = task.model_dump(include={"kind", "text_column", "prompt_column", "max_length"})

    def packed(facts: Facts) -> Iterator[TokenBatch]:
        return _pack(_documents(task, path, files, tokenizer, facts), task.max_length, path)

    def completions(facts: Facts) -> Iterator[TokenBatch]:
        return _complete(task, path, files, tokenizer, facts)

    rows, extras = (packed, ()) if task.prompt_column is None else (completions, (_LOSS_START,))
    return open_store(fingerprint(files, tokenizer, keys), rows, extras)


def _documents(
    task: CausalLMTask, path: str, files: list[DataFile], tokenizer: PreTrainedTokenizerBase, facts: Facts
) -> Iterator[list[int]]:
    """The tokens of each document with the tokenizer's own special tokens, ended by its end of text."""
    end = tokenizer.eos_token_id
    if end is None:
        facts["warnings"].append("The tokenizer has no end-of-text token; documents are joined without one.")
    count = 0
    for chunk in read_rows(files, {task.text_column: "text"}):
        count += len(chunk.columns[task.text_column])
        for ids in tokenizer(chunk.columns[task.text_column], verbose=False)["input_ids"]:
            yield [*ids, end] if end is not None and (not ids or ids[-1] != end) else ids
    require_examples(count, path)


def _pack(documents: Iterator[list[int]], length: int, path: str) -> Iterator[TokenBatch]:
    buffer: list[int] = []
    sequences = 0
    for ids in documents:
        buffer += ids
        while len(buffer) >= length * _SEQUENCES_PER_BATCH:
            yield TokenBatch([buffer[i * length : (i + 1) * length] for i in range(_SEQUENCES_PER_BATCH)])
            sequences += _SEQUENCES_PER_BATCH
            del buffer[: length * _SEQUENCES_PER_BATCH]
    rest = [buffer[i : i + length] for i in range(0, len(buffer) - length + 1, length)]
    if rest:
        yield TokenBatch(rest)
    elif not sequences:
        raise DataError(
            f"All documents together are {len(buffer)} tokens, less than one sequence of task.max_length {length}.",
            where=path,
            advice="Lower task.max_length, or give more text.",
        )


def _complete(
    task: CausalLMTask, path: str, files: list[DataFile], tokenizer: PreTrainedTokenizerBase, facts: Facts
) -> Iterator[TokenBatch]:
    assert task.prompt_column is not None
    count = cut_prompts = cut_completions = 0
    for chunk in read_rows(files, {task.prompt_column: "text", task.text_column: "text"}):
        prompts = tokenizer(chunk.columns[task.prompt_column], verbose=False)["input_ids"]
        completions = tokenizer(chunk.columns[task.text_column], add_special_tokens=False, verbose=False)["input_ids"]
        batch = TokenBatch([], {_LOSS_START: []})
        for position, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            example = _join(prompt, completion, tokenizer, task.max_length)
            if len(example.tokens) <= max(1, example.loss_start):
                raise DataError("There is no token to learn.", where=chunk.where(position, task.text_column))
            batch.tokens.append(example.tokens)
            batch.extras[_LOSS_START].append(example.loss_start)
            cut_prompts += example.prompt_cut
            cut_completions += example.completion_cut
        count += len(batch.tokens)
        yield batch
    require_examples(count, path)
    limit = f"to fit into task.max_length {task.max_length}"
    if cut_prompts:
        facts["warnings"].append(f"{cut_prompts} of {count} prompts were cut on the left {limit}.")
    if cut_completions:
        facts["warnings"].append(f"{cut_completions} of {count} completions were cut at the end {limit}.")


@dataclass(frozen=True, slots=True)
class _Example:
    tokens: list[int]
    loss_start: int
    prompt_cut: bool
    completion_cut: bool


def _join(prompt: list[int], completion: list[int], tokenizer: PreTrainedTokenizerBase, length: int) -> _Example:
    """Prompt, completion and end of text in at most `length` tokens.

    A prompt that is too long loses its beginning, but not the beginning-of-text token; a completion that does not fit
    alone loses its end.
    """
    end = tokenizer.eos_token_id
    if prompt and prompt[-1] in {end, tokenizer.sep_token_id} - {None}:
        # Some tokenizers end everything with it; here the completion follows.
        prompt = prompt[:-1]
    target = completion if end is None else [*completion, end]
    room = max(0, length - len(target))
    kept = prompt
    if len(prompt) > room:
        head = prompt[: min(1, room)] if prompt[0] == tokenizer.bos_token_id else []
        kept = [*head, *prompt[len(prompt) - (room - len(head)) :]]
    return _Example([*kept, *target[:length]], len(kept), len(kept) < len(prompt), len(target) > length)
