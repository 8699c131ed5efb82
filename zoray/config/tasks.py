"""The section `task`: what is learnt, and from which data.

A task either trains a model on its own terms (`CausalLMTask`, `ClassificationTask`) or is put into words that a
language model continues: label words (`PromptedTask`), choices of each row (`MultipleChoiceTask`), or free text
(`GenerationTask`).
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Tag, model_validator
from typing_extensions import Self

from zoray.config.sections import FILES, Architecture, CellKind, Section, fault, key
from zoray.config.templates import TEMPLATES
from zoray.config.worded import GenerationTask, MultipleChoiceTask, PromptedTask


class CausalLMTask(Section):
    """Causal language modelling; without a prompt column, documents are packed into sequences of `max_length`."""

    kind: Literal["causal_lm"] = key(..., "Causal language modelling.", mathematics=True)
    train: str = key(
        ...,
        f"Training data: {FILES}",
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
        f"Training data: {FILES}",
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
