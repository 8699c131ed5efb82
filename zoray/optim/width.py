"""An adaptive number of directions per step: more where the scalars disagree.

A direction that is probed on M >= 2 microbatches gives M estimates of one slope, and so do the two halves of one batch.
The share of noise in their mean,

    rho = mean over k of (variance of g_k over its batches / M)  /  mean over k of (mean of g_k)^2,

is near 0 where the batches agree and near 1 where they only differ. A running mean of it decides: where noise
dominates, the next step has twice as many directions, each with batches of its own, and where batches agree, half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zoray.commits import float32
from zoray.errors import ConfigError
from zoray.optim.shaping import deviation, mean, mean_square

NOISY, CLEAR = 0.5, 0.25
"""Shares of noise above which the number of directions doubles, and below which it halves."""

_MEMORY = 0.8
"""Decay of the running mean of rho."""


@dataclass(frozen=True, slots=True)
class WidthState:
    """`directions` of the next step, and the running mean of rho (nan: none yet), float32."""

    directions: int
    rho: float = math.nan

    @property
    def notes(self) -> tuple[float, ...]:
        """What a commit keeps of it."""
        return float(self.directions), self.rho


@dataclass(frozen=True, slots=True)
class Width:
    """From `least` to `most` directions per step, beginning with `least`.

    Raises:
        ConfigError: they are out of order, or a float32 cannot count so many.
    """

    least: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most < 1 << 24:
            raise ConfigError(
                f"{self.least} to {self.most} directions", where="directions", advice="give a min that is at most max"
            )

    def initial(self) -> WidthState:
        """As few as may be."""
        return WidthState(self.least)

    def next(self, state: WidthState, rho: float) -> WidthState:
        """The width of the step after one with noise `rho`; nan: it says nothing.

        After a change the mean begins anew, so that it is of steps of one width.
        """
        if math.isnan(rho):
            return state
        mixed = rho if math.isnan(state.rho) else _MEMORY * state.rho + (1 - _MEMORY) * rho
        wanted = state.directions * 2 if mixed > NOISY else state.directions // 2 if mixed < CLEAR else state.directions
        wanted = max(self.least, min(self.most, wanted))
        return WidthState(wanted, float32(mixed) if wanted == state.directions else math.nan)

    def read(self, notes: Sequence[float]) -> WidthState:
        """The state that a commit keeps."""
        return WidthState(int(notes[0]), notes[1]) if len(notes) == 2 else self.initial()


def disagreement(rows: Sequence[Sequence[float]]) -> float:
    """rho of a step: `rows` has the projected gradients of each direction on its microbatches, all finite.

    nan where no direction was probed twice, or no slope was found.
    """
    if not rows or len(rows[0]) < 2:
        return math.nan
    noise = mean([deviation(row) ** 2 / len(row) for row in rows])
    signal = mean_square([mean(row) for row in rows])
    return noise / signal if signal else math.nan


def share_of_noise(gradients: Sequence[float], contrasts: Sequence[float | None]) -> float:
    """rho of a step with one microbatch, from a sample of the noise of each of its projected gradients.

    Args:
        gradients: of each direction, all finite.
        contrasts: of each (see `zoray.aggregate.ProbeResult`). One that is missing or not finite leaves rho untold.

    Returns:
        nan where it is not told, or no slope was found. Above 1 by chance, where a step is mostly noise.
    """
    told = [contrast for contrast in contrasts if contrast is not None and math.isfinite(contrast)]
    square = mean_square(gradients) if gradients else 0.0
    return mean_square(told) / square if square and len(told) == len(gradients) else math.nan
