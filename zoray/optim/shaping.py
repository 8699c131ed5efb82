"""Fitness shaping: what a step's projected gradients count for, beside or instead of their sizes.

Each function takes the projected gradients g_k of the directions with a finite loss and gives as many weights w_k; the
update is then -learning_rate / K * sum_k w_k z_k. A positive g_k says that the loss rises along z_k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

Shaping = Literal["none", "centered", "sign", "zscore", "rank", "guided"]
SHAPINGS: tuple[Shaping, ...] = get_args(Shaping)

GUIDED_SHARE = 4
"""One direction in so many is a good candidate of `guided`, and one a bad one."""


def shaped(gradients: Sequence[float], shaping: Shaping) -> list[float]:
    """Weights of the directions with the given (finite) projected gradients, in their order."""
    return _SHAPES[shaping](gradients)


def _none(gradients: Sequence[float]) -> list[float]:
    """w = g: SPSA's estimate of the gradient (Spall 1992)."""
    return list(gradients)


def _centered(gradients: Sequence[float]) -> list[float]:
    """w = g - mean. One-sided differences are all off by about eps/2 tr(H), which this takes away."""
    center = mean(gradients)
    return [g - center for g in gradients]


def _sign(gradients: Sequence[float]) -> list[float]:
    """w = sign(g): one bit per direction, and steps whose length does not depend on the loss's scale."""
    return [math.copysign(1.0, g) if g else 0.0 for g in gradients]


def _zscore(gradients: Sequence[float]) -> list[float]:
    """w = (g - mean) / standard deviation, as in evolution strategies; zero where nothing differs."""
    center = mean(gradients)
    spread = deviation(gradients)
    return [(g - center) / spread if spread else 0.0 for g in gradients]


def _rank(gradients: Sequence[float]) -> list[float]:
    """Centred ranks from -1/2 to 1/2 (Salimans et al. 2017, arXiv 1703.03864); equal ones share their mean rank."""
    if len(gradients) < 2:
        return [0.0] * len(gradients)
    ordered = sorted(gradients)
    first = {g: k for k, g in reversed(list(enumerate(ordered)))}
    last = {g: k for k, g in enumerate(ordered)}
    return [(first[g] + last[g]) / 2 / (len(ordered) - 1) - 0.5 for g in gradients]


def _guided(gradients: Sequence[float]) -> list[float]:
    """Towards the good candidates and away from the bad ones, the others not at all (after MeZO-GV).

    The guiding vector is v = mean of the bad z - mean of the good z. MeZO-GV then measures the slope along it by two
    more forwards; here it is taken from the slopes along its parts, <grad L, v> = mean of the bad g - mean of the good
    g, which it equals but for curvature and other batches.
    """
    if len(gradients) < 2:
        return list(gradients)
    order = sorted(range(len(gradients)), key=lambda k: (gradients[k], k))
    count = max(1, len(order) // GUIDED_SHARE)
    good, bad = order[:count], order[-count:]
    half = (mean([gradients[k] for k in bad]) - mean([gradients[k] for k in good])) / 2
    weights = [0.0] * len(gradients)
    for k in good:
        weights[k] = -half
    for k in bad:
        weights[k] = half
    return weights


_SHAPES: dict[Shaping, Callable[[Sequence[float]], list[float]]] = {
    "none": _none,
    "centered": _centered,
    "sign": _sign,
    "zscore": _zscore,
    "rank": _rank,
    "guided": _guided,
}


def total(values: Sequence[float]) -> float:
    """Sum, added up from the first to the last.

    Not the built-in sum: from Python 3.12 on it compensates rounding, and a ledger must not depend on that.
    """
    found = 0.0
    for value in values:
        found += value
    return found


def mean(values: Sequence[float]) -> float:
    """Mean, added up from the first to the last."""
    return total(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample (n - 1 in the denominator); 0 of fewer than two."""
    if len(values) < 2:
        return 0.0
    center = mean(values)
    return math.sqrt(mean([(value - center) ** 2 for value in values]) * len(values) / (len(values) - 1))


def mean_square(values: Sequence[float]) -> float:
    """Mean of the squares; 0 of none."""
    return mean([value * value for value in values]) if values else 0.0
