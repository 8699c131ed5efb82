"""The section `task`: what is learnt, and from which data.

A task either trains a model on its own terms (`CausalLMTask`, `ClassificationTask`) or is put into words that a
language model continues: label words (`PromptedTask`), choices of each row (`MultipleChoiceTask`), or free text
(`GenerationTask`).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from zoray.config.prompt import expression, prompt, wrong
from zoray.config.sections import Section, fault, key
from zoray.config.templates import TEMPLATES

CellKind = Literal["text", "label", "value"]
"""What a column must hold: `text` is str, `label` is int or str, `value` is anything but null."""

Architecture = Literal["causal", "masked", "classifier"]
"""A causal or masked language model, or a sequence classifier."""

_FILES = (
    "a JSONL, JSON, CSV or Parquet file, or a folder of such files (read in order of their names); also on an object "
    "store (`s3://bucket/folder`, `gs://...`)."
)


class CausalLMTask(Section):
    """Causal language modelling; without a prompt column, documents are packed into sequences of `max_length`."""

    kind: Literal["causal_lm"] = key(..., "Causal language modelling.", mathematics=True)
    train: str = key(
        ...,
        f"Training data: {_FILES}",
        mathematics="content",
        min_length=1,
    )
    eval: str | None = key(None, "Held-out data, of the same form.", mathematics=False, min_length=1)
    text_column: str = key("text", "Column with the text, or with the completion.", mathematics=True, min_length=1)
    prompt_column: str | None = key(
        None,
        "Column with the prompt. With it each row is one example, and the loss is on the completion alone.",
        mathematics=True,
        min_length=1,
    )
    max_length: int = key(128, "Longest sequence, in tokens.", mathematics=True, ge=2)

    @property
    def architecture(self) -> Architecture:
        """The kind of model that is trained."""
        return "causal"

    @property
    def columns(self) -> dict[str, CellKind]:
        """The columns that are read of each row."""
        prompts: dict[str, CellKind] = {self.prompt_column: "text"} if self.prompt_column else {}
        return {**prompts, self.text_column: "text"}

    def rows_per_example(self, *, held_out: bool) -> int:
        """Rows of a batch that an example becomes."""
        return 1

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        if self.prompt_column == self.text_column:
            raise fault(
                "task.prompt_column",
                f"The prompt and the completion are both column {self.text_column!r}.",
                "Name two columns, or leave task.prompt_column out to train on the whole text.",
            )
        return self


class ClassificationTask(Section):
    """Sequence classification of a text or a pair of texts."""

    kind: Literal["classification"] = key(..., "Sequence classification.", mathematics=True)
    train: str = key(
        ...,
        f"Training data: {_FILES}",
        mathematics="content",
        min_length=1,
    )
    eval: str | None = key(None, "Held-out data, of the same form.", mathematics=False, min_length=1)
    text_column: str = key("text", "Column with the text.", mathematics=True, min_length=1)
    text_pair_column: str | None = key(None, "Column with the second text, for pairs.", mathematics=True, min_length=1)
    label_column: str = key(
        "label",
        "Column with the label: integers from 0, or strings (numbered in sorted order).",
        mathematics=True,
        min_length=1,
    )
    num_labels: int | None = key(
        None, "Number of classes. Without it, as many as the training data show.", mathematics=True, ge=2
    )
    max_length: int = key(128, "Longest sequence, in tokens; longer ones are cut.", mathematics=True, ge=2)

    @property
    def architecture(self) -> Architecture:
        """The kind of model that is trained."""
        return "classifier"

    @property
    def columns(self) -> dict[str, CellKind]:
        """The columns that are read of each row."""
        pair: dict[str, CellKind] = {self.text_pair_column: "text"} if self.text_pair_column else {}
        return {self.text_column: "text", **pair, self.label_column: "label"}

    def rows_per_example(self, *, held_out: bool) -> int:
        """Rows of a batch that an example becomes."""
        return 1

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        columns = [self.text_column, self.text_pair_column, self.label_column]
        for name, column in (("label_column", self.label_column), ("text_pair_column", self.text_pair_column)):
            if column is not None and columns.count(column) > 1:
                raise fault(f"task.{name}", f"The column {column!r} is given two parts.", "Name different columns.")
        return self


class WordedTask(Section):
    """What the tasks have in common that are put into words for a causal language model."""

    kind: str = key(..., "Kind of task.", mathematics=True)
    template: str | None = key(
        None,
        f"Fill in the keys of a known data set in its usual columns ({', '.join(TEMPLATES)}); those that are given "
        "here win.",
        mathematics=False,
    )
    train: str = key(..., f"Training data: {_FILES}", mathematics="content", min_length=1)
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


TASKS: dict[str, type[Section]] = {
    "causal_lm": CausalLMTask,
    "classification": ClassificationTask,
    "prompted": PromptedTask,
    "multiple_choice": MultipleChoiceTask,
    "generation": GenerationTask,
}
"""The sections of a task by their tag."""


def task_tag(value: Any) -> str | None:
    """The tag of a task in a file: its `kind`, or `prompted` for a classification that is put into words."""
    if isinstance(value, BaseModel):
        return next((tag for tag, section in TASKS.items() if type(value) is section), None)
    if not isinstance(value, dict):
        # Any section says that it wants a mapping.
        return "causal_lm"
    kind = value.get("kind", TEMPLATES.get(str(value.get("template")), {}).get("kind"))
    if kind == "classification" and value.keys() & {"prompt", "label_words", "template"}:
        return "prompted"
    return None if kind is None or kind == "prompted" else str(kind)


def label_text(label: Any) -> str:
    """A label as the key of `label_words`: `0`, `true`, `entailment`."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def _filled(value: Any) -> Any:
    """A task with the keys of its template."""
    name = value.get("template") if isinstance(value, dict) else None
    if not isinstance(name, str):
        return value
    if name not in TEMPLATES:
        close = get_close_matches(name, TEMPLATES, n=1)
        advice = f"Did you mean {close[0]}?" if close else f"Use one of {', '.join(TEMPLATES)}, or give the prompt."
        raise fault("task.template", f"There is no template {name!r}.", advice)
    kind = TEMPLATES[name]["kind"]
    if value.get("kind", kind) != kind:
        what = f"task.kind is {value['kind']!r}, but the template {name} is of kind {kind}."
        raise fault("task.kind", what, "Leave task.kind out.")
    return {**TEMPLATES[name], **value}


TaskConfig = Annotated[
    Annotated[CausalLMTask, Tag("causal_lm")]
    | Annotated[ClassificationTask, Tag("classification")]
    | Annotated[PromptedTask, Tag("prompted")]
    | Annotated[MultipleChoiceTask, Tag("multiple_choice")]
    | Annotated[GenerationTask, Tag("generation")],
    Discriminator(task_tag),
    BeforeValidator(_filled),
]


def _check(texts: Iterable[str], *, expressed: bool) -> None:
    for text in texts:
        if problem := wrong(text, expressed=expressed):
            kind = "expression" if expressed else "template"
            raise PydanticCustomError(kind, "is no {kind}: {problem}", {"kind": kind, "problem": problem})
