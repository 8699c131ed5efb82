"""Learning-rate schedules with Hugging Face's names and Hugging Face's values (`transformers.get_scheduler`).

Pure functions of the step: the coordinator asks for the rate of a step and puts it into that step's commit, so a run
that is resumed, or replayed, needs no scheduler state.
"""

from __future__ import annotations

import difflib
import math

from zoray.errors import ConfigError

SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)
"""The values of `lr_scheduler_type`."""

POLYNOMIAL_END = 1e-7
"""Where the polynomial schedule ends, as in Hugging Face."""


def learning_rate(
    step: int,
    *,
    learning_rate: float,
    max_steps: int,
    lr_scheduler_type: str = "constant",
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
) -> float:
    """The learning rate of `step`, in float64.

    Args:
        step: number of the step, from 0.
        learning_rate: the rate after the warm-up.
        max_steps: steps of the whole run.
        lr_scheduler_type: one of `SCHEDULES`.
        warmup_steps: steps of a linear warm-up from 0; `constant` has none.
        warmup_ratio: the same as a share of `max_steps`, where `warmup_steps` is 0.

    Raises:
        ConfigError: unknown `lr_scheduler_type`, or a polynomial that would end above its start.
    """
    if lr_scheduler_type not in SCHEDULES:
        near = difflib.get_close_matches(lr_scheduler_type, SCHEDULES, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(SCHEDULES)}"
        raise ConfigError(f"unknown schedule {lr_scheduler_type!r}", where="lr_scheduler_type", advice=advice)
    if lr_scheduler_type == "polynomial" and learning_rate <= POLYNOMIAL_END:
        what = f"the polynomial schedule ends at {POLYNOMIAL_END}, above learning_rate {learning_rate}"
        raise ConfigError(what, where="learning_rate", advice="take lr_scheduler_type: linear, which ends at 0")
    if lr_scheduler_type == "constant":
        return learning_rate
    warmup = warmup_steps or math.ceil(max_steps * warmup_ratio)
    if step < warmup:
        return learning_rate * (step / warmup)
    return learning_rate * _factor(lr_scheduler_type, step, warmup, max_steps, learning_rate)


def depends_on_max_steps(lr_scheduler_type: str, *, warmup_steps: int = 0, warmup_ratio: float = 0.0) -> bool:
    """True if running the same configuration for longer would change the rates of the steps already done."""
    if lr_scheduler_type in ("constant", "constant_with_warmup", "inverse_sqrt"):
        return lr_scheduler_type != "constant" and warmup_steps == 0 and warmup_ratio > 0
    return True


def _factor(kind: str, step: int, warmup: int, max_steps: int, start: float) -> float:
    if kind == "constant_with_warmup":
        return 1.0
    if kind == "inverse_sqrt":
        timescale = warmup or 10_000
        return 1.0 / math.sqrt((step + timescale - warmup) / timescale)
    if kind == "linear":
        return max(0.0, (max_steps - step) / max(1, max_steps - warmup))
    if kind == "polynomial":
        if step >= max_steps:
            return POLYNOMIAL_END / start
        remaining = 1 - (step - warmup) / (max_steps - warmup)
        return ((start - POLYNOMIAL_END) * remaining + POLYNOMIAL_END) / start
    progress = (step - warmup) / max(1, max_steps - warmup)
    if kind == "cosine_with_restarts" and progress >= 1.0:
        return 0.0
    turn = progress % 1.0 if kind == "cosine_with_restarts" else progress
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * turn)))
