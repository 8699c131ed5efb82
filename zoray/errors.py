"""Errors for the user: what was wrong, where, and what to do.

Every error Zoray raises on purpose is a `ZorayError`. Its class decides the exit status of the command, and it survives
pickling, because most of them cross a process border on their way to the person who can act on them.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ZorayError(Exception):
    """A fault the user can act on.

    Args:
        what: one sentence saying what was wrong, with the offending value.
        where: the file, configuration key, line or byte offset it was found at.
        advice: what to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str | None = None, advice: str | None = None) -> None:
        self.what, self.where, self.advice = what, where, advice
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.advice:
            lines.append(f"  to do: {self.advice}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.what, self.where, self.advice)


def _rebuild(kind: type[ZorayError], what: str, where: str | None, advice: str | None) -> ZorayError:
    return kind(what, where=where, advice=advice)


class ConfigError(ZorayError):
    """A configuration that cannot be run as written (exit status 2)."""

    exit_code = 2


class DataError(ZorayError):
    """A data set that is missing, empty or does not fit the task (exit status 3)."""

    exit_code = 3


class ModelError(ZorayError):
    """A model that is missing, or cannot do what the configuration asks (exit status 4)."""

    exit_code = 4


class LedgerError(ZorayError):
    """A ledger that is damaged, or belongs to another run (exit status 5)."""

    exit_code = 5


class RunError(ZorayError):
    """A run folder that exists already, is missing, or does not match what is asked of it (exit status 6)."""

    exit_code = 6


class ResourceError(ZorayError):
    """Not enough memory, processors or accelerators, or a port that is taken (exit status 7)."""

    exit_code = 7


class NumericsError(ZorayError):
    """Losses that are not finite, or replicas that disagree (exit status 8)."""

    exit_code = 8
