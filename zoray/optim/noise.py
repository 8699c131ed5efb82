"""How much of the projected gradients is signal: by so much the best step is shorter than the curvature alone says.

A projected gradient on one batch is <grad L, z> and noise of the batch, so that E g^2 = |grad L|^2 (1 + s/B) with s the
trace of a row's gradient covariance over |grad L|^2 and B the rows. A step of eta along sum_k g_k z_k is best at
eta = share / z'Hz with share = 1 / (1 + s/B). Two batches along one direction tell it, and so do the two halves of one:
their slopes have nothing in common but the signal.

The mean goes back far. A share that followed each step would be best for the loss of the next one, and too small too
early for that at the end (Wu et al. 2018, arXiv 1803.02021): what noise is there is taken away by the schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from zoray.commits import float32

ASSUMED = 0.1
"""Share of signal where probes have one row, which does not tell; about that of small batches."""

LEAST = 0.01
"""What a share is at least: a measured one may be negative by chance."""

_MEMORY = 0.998
"""Decay of the running sums: a share is measured by many small products, each mostly noise."""

_DOUBT = 20
"""Steps of which the assumption is worth as much."""

_LOUDEST = 1 / _DOUBT
"""What one step may add to a sum, as a share of it: squares are of any size, and one outlier would be all there is."""


@dataclass(frozen=True, slots=True)
class SignalState:
    """Running sums over the steps of the signal in a step's mean square, and of the mean square itself; float32."""

    signal: float = 0.0
    total: float = 0.0

    @property
    def share(self) -> float:
        """Share of signal, between `LEAST` and 1; `ASSUMED` before the first step that told."""
        return max(LEAST, min(1.0, self.signal / self.total)) if self.total > 0 else ASSUMED

    @property
    def notes(self) -> tuple[float, ...]:
        """What a commit keeps of it."""
        return self.signal, self.total


UNTOLD = SignalState()
"""Before the first step."""


def heard(state: SignalState, square: float, noise: float) -> SignalState:
    """The state with one step more.

    Args:
        square: mean square of the step's projected gradients.
        noise: how much of it is noise; nan if nothing tells. A step whose sums float32 could not hold says nothing.
    """
    if math.isnan(noise) or square <= 0:
        return state
    signal, total = (state.signal, state.total) if state.total > 0 else (_DOUBT * ASSUMED * square, _DOUBT * square)
    weight = min(1.0, _LOUDEST * total / max(square, noise))
    found = SignalState(
        float32(_MEMORY * signal + weight * (square - noise)), float32(_MEMORY * total + weight * square)
    )
    return found if math.isfinite(found.signal) and 0 < found.total < math.inf else state
