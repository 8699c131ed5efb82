"""The tasks that are put into words for a language model: label words, choices of each row, and free text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import field_validator, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from zoray.config.prompt import expression, prompt, wrong
from zoray.config.sections import FILES, Architecture, CellKind, Section, fault, key
from zoray.config.templates import TEMPLATES


class WordedTask(Section):
    """What the tasks have in common that are put into words for a causal language model."""

    kind: str = key(..., "Kind of task.", mathematics=True)
    template: str | None = key(
        None,
        f"Fill in the keys of a known data set in its usual columns ({', '.join(TEMPLATES)}); those that are given "
        "here win.",
        mathematics=False,
    )
    train: str = key(..., f"Training data: {FILES}", mathematics="content", min_length=1)
    eval: str | None = key(None, "Held-out data, of the same form.", mathematics=False, min_length=1)
    prompt: str = key(
        ...,
        "What comes before the answer, with columns in braces: `{sentence} It was`. The language is Jinja's with one "
        "brace: `{question.strip()}`. Between it and the answer comes a space, unless it ends in white space.",
        mathematics=True,
    )
    max_length: int = key(
        512, "Longest sequence, in tokens; longer prompts lose their beginning.", mathematics=True, ge=2
    )
    train_samples: int | None = key(
        None, "Train on so many examples, drawn by `sample_seed`. Without it, on all.", mathematics=True, ge=1
    )
    dev_samples: int | None = key(
        None,
        "Evaluate during the run on so many examples of `train`, which are not trained on; `zoray eval` still "
        "evaluates on `eval`.",
        mathematics=False,
        ge=1,
    )
    eval_samples: int | None = key(
        None, "Evaluate on so many examples of `eval`, drawn by `sample_seed`.", mathematics=False, ge=1
    )
    sample_seed: int = key(0, "Which examples are drawn.", mathematics=True, ge=0, le=2**63 - 1)

    @property
    def architecture(self) -> Architecture:
        """The kind of model that is trained."""
        return "causal"

    @property
    def templates(self) -> tuple[str, ...]:
        """All texts with columns in braces."""
        return (self.prompt,)

    @property
    def expressions(self) -> tuple[str, ...]:
        """All expressions over columns."""
        return ()

    @property
    def columns(self) -> dict[str, CellKind]:
        """The columns that are read of each row, in alphabetical order."""
        found = frozenset[str]().union(
            *(prompt(text).columns for text in self.templates), *(expression(text).columns for text in self.expressions)
        )
        return dict.fromkeys(sorted(found - {"choice", "mask"}), "value")

    @field_validator("prompt", "choice_text", check_fields=False)
    @classmethod
    def _is_a_template(cls, value: str) -> str:
        _check([value], expressed=False)
        return value

    @field_validator("choices", "answer", "answers", check_fields=False)
    @classmethod
    def _is_an_expression(cls, value: str | list[str]) -> str | list[str]:
        _check([value] if isinstance(value, str) else value, expressed=True)
        return value


class PromptedTask(WordedTask):
    """Classification by the label word that a language model finds most likely after a prompt.

    A prompt with `{mask}` (`{sentence} It was {mask}.`) is for a masked language model such as RoBERTa, and the word is
    in its place.
    """

    kind: Literal["classification"] = key(..., "Classification by label words.", mathematics=True)
    label_words: dict[str, str] = key(
        ..., "The word for each label: `{0: terrible, 1: great}`.", mathematics=True, min_length=2
    )
    label_column: str = key("label", "Column with the label.", mathematics=True, min_length=1)
    loss: Literal["candidates", "answer"] = key(
        "candidates",
        "`candidates`: cross entropy of the right word among all, by their mean log-likelihoods per token. `answer`: "
        "the language-model loss of the right word alone, which takes one row per example instead of one per word.",
        mathematics=True,
    )
    k_shot: int | None = key(
        None, "Train on so many examples of each class, drawn by `sample_seed`.", mathematics=True, ge=1
    )

    @property
    def architecture(self) -> Architecture:
        """The kind of model that is trained."""
        return "masked" if "mask" in prompt(self.prompt).columns else "causal"

    @property
    def columns(self) -> dict[str, CellKind]:
        """The columns that are read of each row."""
        return {**super().columns, self.label_column: "value"}

    def rows_per_example(self, *, held_out: bool) -> int:
        """Rows of a batch that an example becomes."""
        return len(self.label_words) if held_out or self.loss == "candidates" else 1

    @field_validator("label_words", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        return {label_text(label): word for label, word in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if self.k_shot is not None and self.train_samples is not None:
            raise fault(
                "task.k_shot",
                f"k_shot ({self.k_shot} per class) and train_samples ({self.train_samples}) are both given.",
                "Give one of them.",
            )
        if len(set(self.label_words.values())) < len(self.label_words):
            raise fault("task.label_words", "Two labels have the same word.", "Give each label a word of its own.")
        return self


class MultipleChoiceTask(WordedTask):
    """The most likely of the choices that come with each row, by mean log-likelihood per token."""

    kind: Literal["multiple_choice"] = key(..., "One of several continuations.", mathematics=True)
    choices: str | list[str] = key(
        ...,
        "The choices: a list of columns (`[choice1, choice2]`), or an expression for a list (`entities`).",
        mathematics=True,
        min_length=1,
    )
    choice_text: str = key(
        "{choice}", "What continues the prompt, with the choice as `{choice}` and columns.", mathematics=True
    )
    answer: str = key(
        "label",
        "Expression for the right choice: its number from 0, its text, or a list of texts that are all right.",
        mathematics=True,
        min_length=1,
    )
    loss: Literal["candidates", "answer"] = key(
        "answer",
        "`answer`: language-model loss of the right choice (as MeZO has it for COPA and ReCoRD). `candidates`: cross "
        "entropy of it among all, which takes one row for each.",
        mathematics=True,
    )

    @property
    def templates(self) -> tuple[str, ...]:
        """All texts with columns in braces."""
        return (self.prompt, self.choice_text)

    @property
    def expressions(self) -> tuple[str, ...]:
        """All expressions over columns."""
        return (*([self.choices] if isinstance(self.choices, str) else self.choices), self.answer)

    def rows_per_example(self, *, held_out: bool) -> int:
        """Rows of a batch that an example becomes; where the data say how many choices there are, a guess."""
        if not held_out and self.loss == "answer":
            return 1
        return 2 if isinstance(self.choices, str) else len(self.choices)


class GenerationTask(WordedTask):
    """Text that a causal language model writes after a prompt; trained on the first of the right answers."""

    kind: Literal["generation"] = key(..., "Generated text.", mathematics=True)
    answers: str = key(
        "answer", "Expression for the right answers: a text, or a list of them.", mathematics=True, min_length=1
    )
    stop: str = key(
        "\n", "Ends an answer: learnt after it, and where generated text is cut.", mathematics=True, min_length=1
    )
    max_new_tokens: int = key(50, "Most tokens that are generated.", mathematics=True, ge=1)

    @property
    def expressions(self) -> tuple[str, ...]:
        """All expressions over columns."""
        return (self.answers,)

    def rows_per_example(self, *, held_out: bool) -> int:
        """Rows of a batch that an example becomes."""
        return 1

    @model_validator(mode="after")
    def _leaves_room(self) -> Self:
        if self.max_new_tokens >= self.max_length:
            raise fault(
                "task.max_new_tokens",
                f"max_new_tokens ({self.max_new_tokens}) leaves no room for a prompt in max_length {self.max_length}.",
                "Raise task.max_length.",
            )
        return self


def label_text(label: Any) -> str:
    """A label as the key of `label_words`: `0`, `true`, `entailment`."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def _check(texts: Iterable[str], *, expressed: bool) -> None:
    for text in texts:
        if problem := wrong(text, expressed=expressed):
            kind = "expression" if expressed else "template"
            raise PydanticCustomError(kind, "is no {kind}: {problem}", {"kind": kind, "problem": problem})
