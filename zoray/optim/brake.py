"""What keeps a run from going astray: once the loss has risen by more than chance, steps are half as long.

The curvature and the share of signal are measured along random directions, on a few rows. Where nearly all of a
gradient is noise, the share may be ten times too large for a while; steps that are ten times too long raise the loss,
and with it the gradient, of which more is signal then. Nothing in that loop sees the loss, which every probe tells.

The lowest of many means is lower than any one by chance, so a rise has to be a clear one: of 60 simulated runs of 8,000
steps whose loss stays where it is, none is slowed down. With momentum, what older steps still move is not shortened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from zoray.commits import float32

_DECAY = 0.95
"""Of the running means; that of the loss is over about 40 steps."""

_FIRST = 20
"""Steps before a rise is looked for."""

_MEMORY = 0.998
"""Decay of the running mean that tells how far the losses of neighbouring steps are apart."""

_RISE = 7.0
"""Standard errors by which the mean lies above its lowest, that are no chance any more."""

_LEAST_RISE = 1e-3
"""And at least this part of the loss: one that is the same at every step has no error."""

_SHORTEST = 2.0**-10
"""What steps are multiplied with at least."""


@dataclass(frozen=True, slots=True)
class BrakeState:
    """What is known of the loss, float32 each.

    Attributes:
        recent: its running mean.
        lowest: the lowest that this was.
        last: that of the last step.
        spread: running mean of half the squared change from step to step, which is its variance within a step, not
            corrected for its start at 0.
        seen: steps so far, since the last time that steps became shorter: they must show what they do first.
        changes: all changes so far.
        factor: what steps are multiplied with.
    """

    recent: float = 0.0
    lowest: float = 0.0
    last: float = 0.0
    spread: float = 0.0
    seen: int = 0
    changes: int = 0
    factor: float = 1.0

    @property
    def notes(self) -> tuple[float, ...]:
        """What a commit keeps of it."""
        return self.recent, self.lowest, self.last, self.spread, float(self.seen), float(self.changes), self.factor


_COUNTED = 1 << 20
"""Steps are counted as long as it matters, and float32 can count."""

RELEASED = BrakeState()
"""Before the first step."""


def watched(state: BrakeState, loss: float) -> BrakeState:
    """The state with one step's mean loss more; one that float32 cannot hold says nothing."""
    loss = float32(loss)
    if not math.isfinite(float32(loss * loss)):
        return state
    spread, changes = state.spread, state.changes
    if state.seen or changes:
        spread = float32(_MEMORY * spread + (1 - _MEMORY) * (loss - state.last) ** 2 / 2)
        changes = min(changes + 1, _COUNTED)
    # A plain mean at first, which forgets the first step by and by.
    newest = max(1 - _DECAY, 1 / (state.seen + 1))
    recent = float32((1 - newest) * state.recent + newest * loss)
    seen = min(state.seen + 1, _COUNTED)
    lowest = min(state.lowest, recent) if seen > _FIRST else recent
    # Of two means of so many steps.
    variance = spread / (1 - _MEMORY**changes) * 2 * newest / (2 - newest) if changes else 0.0
    if recent - lowest > max(_RISE * math.sqrt(variance), _LEAST_RISE * abs(recent)):
        return BrakeState(0.0, 0.0, loss, spread, 0, changes, max(state.factor / 2, _SHORTEST))
    return BrakeState(recent, lowest, loss, spread, seen, changes, state.factor)
