"""Saying briefly what is wrong with a model."""

from __future__ import annotations


def reason(error: Exception) -> str:
    """The first line of an error, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0].rstrip(". ")
    return text if len(text) <= 300 else text[:297] + "..."


def some(names: list[str]) -> str:
    """A list of names, the middle of a long one left out."""
    shown = names if len(names) <= 6 else [*names[:3], "...", *names[-2:]]
    return ", ".join(shown)
