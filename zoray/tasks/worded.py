"""What the tasks have in common that are put into words: rows that are chosen, prompts, and answers after them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from zoray.config import PromptedTask, WordedTask
from zoray.config.prompt import prompt
from zoray.config.worded import label_text
from zoray.errors import DataError
from zoray.tasks.base import require_examples
from zoray.tasks.source import DataFile, find_files, read_rows
from zoray.tasks.subset import Parts, choose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = tuple[dict[str, Any], str]
"""Cells by column, and the row's place for messages."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The tokens of a prompt with an answer.

    Attributes:
        tokens: at most `max_length`.
        start: of the answer among them.
        cut: the prompt has lost its beginning.
    """

    tokens: list[int]
    start: int
    cut: bool


class Source:
    """The rows of one data set of a task, and which of them are used for what.

    Args:
        task: of the run.
        path: `task.train` or `task.eval`.
        training: whether rows are chosen to train on, or only to evaluate on.

    Attributes:
        files: of the data set.
    """

    def __init__(self, task: WordedTask, path: str, *, training: bool) -> None:
        self.task, self.path, self.training = task, path, training
        self.files: list[DataFile] = find_files(path)

    @cached_property
    def parts(self) -> Parts:
        """Which rows are used; the data are read once for it.

        Raises:
            DataError: there are too few.
        """
        task = self.task
        k_shot = task.k_shot if self.training and isinstance(task, PromptedTask) else None
        column = task.label_column if isinstance(task, PromptedTask) else next(iter(task.columns))
        labels = [
            label_text(cell) for chunk in read_rows(self.files, {column: "value"}) for cell in chunk.columns[column]
        ]
        require_examples(len(labels), self.path)
        if not self.training:
            return choose(len(labels), task.sample_seed, self.path, samples=task.eval_samples)
        samples, dev = task.train_samples, task.dev_samples or 0
        return choose(len(labels), task.sample_seed, self.path, samples=samples, dev=dev, k_shot=k_shot, labels=labels)

    def rows(self, *, dev: bool) -> Iterator[list[Row]]:
        """The rows that are used, a chunk of the file at a time."""
        wanted = set(self.parts.dev if dev else self.parts.train)
        columns, number = self.task.columns, 0
        for chunk in read_rows(self.files, columns):
            count = len(next(iter(chunk.columns.values())))
            chosen = [i for i in range(count) if number + i in wanted]
            number += count
            if chosen:
                yield [({name: cells[i] for name, cells in chunk.columns.items()}, chunk.place(i)) for i in chosen]

    def keys(self, *, dev: bool) -> dict[str, Any]:
        """What of the configuration decides which tokens there are."""
        ignored = {"template", "train", "eval", "loss", "max_new_tokens"}
        keys = {**self.task.model_dump(exclude=ignored), "training": self.training, "dev": dev}
        if isinstance(self.task, PromptedTask):
            # Candidates are numbered in the order of the words, which a fingerprint does not see of a mapping.
            keys["label_words"] = list(self.task.label_words.items())
        return keys


def answered(
    tokenizer: PreTrainedTokenizerBase,
    task: WordedTask,
    prompts: Sequence[str],
    answers: Sequence[str],
    places: Sequence[str],
) -> list[Answered]:
    """Tokens of each prompt with its answer.

    Both are tokenised together, as they will be read; the answer begins with the first token that the prompt alone has
    not. What a tokenizer puts behind every text is left out. A prompt that is too long loses its beginning, but not the
    beginning-of-text token.

    Raises:
        DataError: an answer has no token that could be predicted, or is too long by itself.
    """
    if not prompts:
        return []
    wholes = [joined(*each) for each in zip(prompts, answers, strict=True)]
    alone, both = (tokenizer(list(texts), verbose=False)["input_ids"] for texts in (prompts, wholes))
    return [_fitted(tokenizer, task, *each) for each in zip(alone, both, places, strict=True)]


def joined(before: str, answer: str) -> str:
    """A prompt and its answer, with a space between them unless the prompt ends in white space."""
    return before + ("" if not before or before[-1].isspace() else " ") + answer


def prompts(task: WordedTask, rows: Sequence[Row], mask: str | None = None) -> list[str]:
    """The prompt of each row; `mask` is what stands for `{mask}`."""
    return [prompt(task.prompt).render({**row, "mask": mask}, where) for row, where in rows]


def word_of(task: PromptedTask, row: dict[str, Any], where: str) -> tuple[list[str], set[int]]:
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


def _fitted(
    tokenizer: PreTrainedTokenizerBase, task: WordedTask, alone: list[int], both: list[int], where: str
) -> Answered:
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    if len(both) > 1 and both[-1] in ends and alone[-1:] == both[-1:]:
        both = both[:-1]
    start = next((i for i, pair in enumerate(zip(alone, both, strict=False)) if pair[0] != pair[1]), len(alone))
    start = min(start, len(both))
    answer, room = both[start:], task.max_length - (len(both) - start)
    if not answer or len(both) < 2:
        raise DataError("The answer has no token.", where=where, advice="Compare it with the prompt.")
    if room < 1:
        raise DataError(
            f"The answer alone is {len(answer)} tokens, and task.max_length is {task.max_length}.",
            where=where,
            advice="Raise task.max_length.",
        )
    kept = shortened(both[:start], room, tokenizer.bos_token_id)
    return Answered([*kept, *answer], len(kept), len(kept) < start)


def shortened(tokens: list[int], room: int, begin: int | None) -> list[int]:
    """The last `room` tokens, the first of them replaced by the beginning-of-text token if the whole begins with it."""
    if len(tokens) <= room:
        return tokens
    head = tokens[: min(1, room)] if tokens[0] == begin else []
    return [*head, *tokens[len(tokens) - (room - len(head)) :]]
