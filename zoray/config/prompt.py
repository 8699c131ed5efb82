"""Prompts and expressions over the columns of a row, in the language of Jinja (as chat templates are), with one brace.

`{sentence} It was` is a prompt; `{question[0] | upper}{question[1:]}` too. What a cell holds is never taken for a part
of the template. The environment is Jinja's sandbox: a configuration can compute text and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, TemplateError, Undefined, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zoray.errors import DataError

_ENVIRONMENT = ImmutableSandboxedEnvironment(
    variable_start_string="{", variable_end_string="}", undefined=StrictUndefined, keep_trailing_newline=True
)


class Prompt:
    """A text with columns in braces.

    Raises:
        TemplateError: the text is no template.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.columns = frozenset(meta.find_undeclared_variables(_ENVIRONMENT.parse(text)))
        self._template = _ENVIRONMENT.from_string(text)

    def render(self, row: Mapping[str, Any], where: str) -> str:
        """The text for a row.

        Args:
            row: cells by column.
            where: the row's place, for messages.

        Raises:
            DataError: the row's cells do not fit the template.
        """
        try:
            return self._template.render(row)
        except Exception as error:
            raise _unfit(self.text, error, where) from error


class Expression:
    """A value computed of columns: `answers.text`, `[choice1, choice2]`.

    Raises:
        TemplateError: the text is no expression.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.columns = frozenset(meta.find_undeclared_variables(_ENVIRONMENT.parse(f"{{{text}}}")))
        self._compiled = _ENVIRONMENT.compile_expression(text, undefined_to_none=False)

    def value(self, row: Mapping[str, Any], where: str) -> Any:
        """The value for a row; arguments and errors as of `Prompt.render`."""
        try:
            found = self._compiled(row)
        except Exception as error:
            raise _unfit(self.text, error, where) from error
        if isinstance(found, Undefined):
            raise DataError(f"{self.text!r} has no value here.", where=where, advice="Compare it with the columns.")
        return found


@cache
def prompt(text: str) -> Prompt:
    """A prompt, compiled once."""
    return Prompt(text)


@cache
def expression(text: str) -> Expression:
    """An expression, compiled once."""
    return Expression(text)


def wrong(text: str, *, expressed: bool = False) -> str | None:
    """What is wrong with a prompt, or with an expression; None if nothing is."""
    try:
        expression(text) if expressed else prompt(text)
    except TemplateError as error:
        return str(error).rstrip(".")
    return None


def _unfit(text: str, error: Exception, where: str) -> DataError:
    said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return DataError(f"{text!r} cannot be filled in: {said}.", where=where, advice="Compare it with the columns.")
