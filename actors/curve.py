"""A curve of bounded length over a run of any length."""

from __future__ import annotations

import math
from collections.abc import Iterable

Points = tuple[tuple[float, float], ...]


class Curve:
    """Means of a noisy quantity over stretches of steps of equal width, which doubles whenever there are too many.

    Args:
        limit: points there are at most; an even number.
    """

    def __init__(self, limit: int = 128) -> None:
        self.limit, self.width = limit, 1
        self._sums: list[tuple[int, float, int]] = []

    @classmethod
    def of(cls, values: Iterable[tuple[int, float]], limit: int = 128) -> Curve:
        """The curve of (step, value) pairs."""
        made = cls(limit)
        for step, value in values:
            made.add(step, value)
        return made

    @property
    def points(self) -> Points:
        """(mean step, mean value) of each stretch; those without a finite value are left out."""
        return tuple((steps / n, total / n) for steps, total, n in self._sums if n)

    def add(self, step: int, value: float) -> None:
        """The value at a step; one that is not finite is passed over."""
        while step // self.width >= self.limit:
            pairs = zip(self._sums[::2], [*self._sums[1::2], (0, 0.0, 0)], strict=False)
            self._sums = [(i + j, a + b, m + n) for (i, a, m), (j, b, n) in pairs]
            self.width *= 2
        stretch = step // self.width
        self._sums += [(0, 0.0, 0)] * (stretch + 1 - len(self._sums))
        if math.isfinite(value):
            steps, total, n = self._sums[stretch]
            self._sums[stretch] = (steps + step, total + value, n + 1)
