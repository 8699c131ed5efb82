"""Means with confidence intervals, paired differences, and how soon a curve comes down to a loss. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the half width of its 95 % confidence interval (Student's t), infinite for a single value."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        spread = f" ± {self.half:.2g}" if math.isfinite(self.half) else ""
        return f"{self.mean:.4g}{spread}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of independent values.

    Raises:
        ValueError: there is none.
    """
    if not values:
        raise ValueError("the mean of no value")
    count = len(values)
    mean = float(np.mean(values))
    if count == 1 or not math.isfinite(mean):
        return Estimate(mean, math.inf, count)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error, count)


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Estimate | None:
    """Mean of our values minus theirs over the seeds that both have; None if they share none."""
    shared = sorted(ours.keys() & theirs.keys())
    return estimate([ours[seed] - theirs[seed] for seed in shared]) if shared else None


def first_below(passes: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Forward passes after which a curve, straight between its points, first comes down to `target`; None if never."""
    for index, loss in enumerate(losses):
        if loss <= target:
            if index == 0:
                return passes[0]
            share = (losses[index - 1] - target) / (losses[index - 1] - loss)
            return passes[index - 1] + share * (passes[index] - passes[index - 1])
    return None


def effective_dimension(cosine: float, directions: int) -> float:
    """d of cos = sqrt(K / (d + K - 1)): the number of weights that would make an estimate from K directions this good.

    For directions with E[z z^T] = I and |z|^2 = d, a sum of K of them weighted by their own projections has
    E|estimate|^2 = |gradient|^2 (d + K - 1) / K, and <estimate, gradient> = |gradient|^2 on average.
    """
    return directions / cosine**2 - directions + 1


def expected_cosine(weights: float, directions: int) -> float:
    """Cosine of an estimate to the gradient in theory: see `effective_dimension`."""
    return math.sqrt(directions / (weights + directions - 1))
