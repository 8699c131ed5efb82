"""A learning rate without a unit: the curvature of the loss, measured along the directions that are probed anyway.

A step of eta along sum_k g_k z_k changes the loss by about -eta sum g_k^2 + eta^2/2 sum g_k^2 z'Hz, so that it is best
at eta = 1 / z'Hz, and z'Hz is tr(H) on average (Hutchinson 1989). One more evaluation per step, at the weights
themselves, gives a sample of it: z'Hz = (L(theta + eps z) + L(theta - eps z) - 2 L(theta)) / eps^2. It varies by only
about sqrt(2) |H|_F around tr(H), so a short running mean will do. Noise of the batches in g makes smaller steps better
than that: hence learning rates below 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from zoray.commits import float32


@dataclass(frozen=True, slots=True)
class CurvatureState:
    """Running means of the samples and of their squares, not corrected for their start at 0, and their number."""

    mean: float = 0.0
    square: float = 0.0
    seen: int = 0

    @property
    def notes(self) -> tuple[float, ...]:
        """What a commit keeps of it, float32 each."""
        return self.mean, self.square, float(self.seen)


_DOUBT = 10
"""Samples after which a step is half as long as it will be."""

UNKNOWN = CurvatureState()
"""Before the first sample."""


def added(state: CurvatureState, sample: float, beta: float) -> CurvatureState:
    """The state with one more sample; one that is not finite, or too large for float32 when squared, says nothing."""
    mean = float32(beta * state.mean + (1 - beta) * sample)
    square = float32(beta * state.square + (1 - beta) * sample * sample)
    if not (math.isfinite(mean) and math.isfinite(square)):
        return state
    # Counted as long as it matters, and float32 can count.
    return CurvatureState(mean, square, min(state.seen + 1, 1 << 20))


def cautious(state: CurvatureState, beta: float) -> float:
    """The mean and its standard error above it, and more while there are few samples. 0 before the first.

    The curvature may change with the first steps by more than samples at one place can tell: new adapters, of which one
    factor is 0, have next to none.

    The error is taken from the mean square, not from the variance, so that it is not 0 after one sample, and a mean
    that is negative by chance, or at a saddle, gives a small step and no division by zero.
    """
    if not state.seen:
        return 0.0
    share = 1 - beta**state.seen
    # Of an exponential mean: (sum of weights)^2 / sum of squared weights.
    effective = share * (1 + beta) / ((1 - beta) * (1 + beta**state.seen))
    known = max(0.0, state.mean / share) + math.sqrt(state.square / share / effective)
    return known * (1 + _DOUBT / state.seen)
