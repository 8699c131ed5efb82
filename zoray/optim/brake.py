"""What keeps a run from going astray: once the loss has risen by more than chance, steps are half as long.

The curvature and the share of signal are measured along random directions, on a few rows. Where nearly all of a
gradient is noise, the share may be ten times too large for a while; steps that are ten times too long raise the loss,
and with it the gradient, of which more is signal then. Nothing in that loop sees the loss, which every probe tells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from zoray.commits import float32

_DECAY = 0.95
"""Of the running means; that of the loss is over about 40 steps."""

_FIRST = 20
"""Steps before a rise is looked for."""

_RISE = 4.0
"""Standard errors by which the mean lies above its lowest, that are no chance any more."""


@dataclass(frozen=True, slots=True)
class BrakeState:
    """What is known of the loss, float32 each.

    Attributes:
        recent: its running mean.
        lowest: the lowest that was, since the last time that steps became shorter.
        last: that of the last step.
        spread: running mean of half the squared change from step to step, which is its variance within a step.
        seen: steps so far.
        factor: what steps are multiplied with.
    """

    recent: float = 0.0
    lowest: float = 0.0
    last: float = 0.0
    spread: float = 0.0
    seen: int = 0
    factor: float = 1.0

    @property
    def notes(self) -> tuple[float, ...]:
        """What a commit keeps of it."""
        return self.recent, self.lowest, self.last, self.spread, float(self.seen), self.factor


RELEASED = BrakeState()
"""Before the first step."""


def watched(state: BrakeState, loss: float) -> BrakeState:
    """The state with one step's mean loss more; one that float32 cannot hold says nothing."""
    loss = float32(loss)
    if not math.isfinite(float32(loss * loss)):
        return state
    if not state.seen:
        return BrakeState(loss, loss, loss, 0.0, 1, state.factor)
    # A plain mean at first, which forgets the first step by and by.
    newest = max(1 - _DECAY, 1 / (state.seen + 1))
    recent = float32((1 - newest) * state.recent + newest * loss)
    spread = float32((1 - newest) * state.spread + newest * (loss - state.last) ** 2 / 2)
    seen, factor = min(state.seen + 1, 1 << 20), state.factor
    lowest = min(state.lowest, recent) if seen > _FIRST else recent
    # Of two means of so many steps.
    error = math.sqrt(spread * 2 * newest / (2 - newest))
    if recent - lowest > _RISE * error:
        lowest, factor = recent, factor / 2
    return BrakeState(recent, lowest, loss, spread, seen, factor)
