"""One evaluation of a trial: the loss of every held-out example, so that two trials can be compared example by example.

All trials see the same examples. The spread of easy and hard ones is common to them and drops out of the difference, so
a paired comparison tells apart what two standard errors beside each other never would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DOUBT = 2.0
"""Two trials are told apart if their mean difference is more than so many of its standard errors."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Losses of the held-out examples at some step.

    Attributes:
        losses: mean loss of each example that has a target, in the order of the data.
        correct: examples classified correctly; 0 where nothing is classified.
    """

    losses: tuple[float, ...]
    correct: int = 0

    @property
    def count(self) -> int:
        """Examples."""
        return len(self.losses)

    @property
    def loss(self) -> float:
        """Mean over the examples; nan if there are none."""
        return math.fsum(self.losses) / len(self.losses) if self.finite else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation between examples; nan for fewer than two."""
        if len(self.losses) < 2 or not self.finite:
            return math.nan
        mean = self.loss
        return math.sqrt(math.fsum((loss - mean) ** 2 for loss in self.losses) / (len(self.losses) - 1))

    @property
    def standard_error(self) -> float:
        """Of the mean over examples; nan for fewer than two."""
        return self.deviation / math.sqrt(len(self.losses)) if self.losses else math.nan

    @property
    def accuracy(self) -> float | None:
        """Share of examples classified correctly; None where none is."""
        return self.correct / len(self.losses) if self.correct else None

    @property
    def finite(self) -> bool:
        """Whether there are examples, and each has a loss that is a number."""
        return bool(self.losses) and all(map(math.isfinite, self.losses))

    def above(self, other: Evaluated) -> tuple[float, float]:
        """By how much the loss is above another's on the same examples, and the standard error of that (or nan)."""
        difference = Evaluated(tuple(a - b for a, b in zip(self.losses, other.losses, strict=True)))
        return difference.loss, difference.standard_error

    def told_from(self, other: Evaluated) -> bool:
        """Whether the difference from another is more than chance would make of equal ones."""
        if self.losses == other.losses or not (self.finite and other.finite):
            return self.losses != other.losses
        difference, error = self.above(other)
        return abs(difference) > DOUBT * error
