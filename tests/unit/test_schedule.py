from __future__ import annotations

import math

import pytest
import torch
from transformers import get_scheduler

from zoray.errors import ConfigError
from zoray.schedule import SCHEDULES, depends_on_max_steps, learning_rate

STEPS = 50


def reference(kind: str, rate: float, warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS)
    rates = []
    for _ in range(STEPS):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("rate", [1e-6, 0.3])
@pytest.mark.parametrize("warmup", [0, 1, 7, STEPS - 1])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_rates_are_those_of_transformers(kind: str, warmup: int, rate: float) -> None:
    ours = [
        learning_rate(step, learning_rate=rate, max_steps=STEPS, lr_scheduler_type=kind, warmup_steps=warmup)
        for step in range(STEPS)
    ]
    assert ours == reference(kind, rate, warmup)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_warmup_as_long_as_the_run_or_longer_stays_below_the_peak(kind: str) -> None:
    for warmup in (STEPS, 2 * STEPS):
        rate = learning_rate(25, learning_rate=1.0, max_steps=STEPS, lr_scheduler_type=kind, warmup_steps=warmup)
        assert rate == (1.0 if kind == "constant" else 25 / warmup)
        assert math.isfinite(
            learning_rate(STEPS, learning_rate=1.0, max_steps=STEPS, lr_scheduler_type=kind, warmup_steps=warmup)
        )


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_warmup_ratio_is_rounded_up_and_gives_way_to_steps(kind: str) -> None:
    def rate(step: int, steps: int, ratio: float) -> float:
        return learning_rate(
            step, learning_rate=1.0, max_steps=STEPS, lr_scheduler_type=kind, warmup_steps=steps, warmup_ratio=ratio
        )

    assert [rate(s, 0, 0.11) for s in range(STEPS)] == [rate(s, 6, 0.0) for s in range(STEPS)]
    assert [rate(s, 3, 0.5) for s in range(STEPS)] == [rate(s, 3, 0.0) for s in range(STEPS)]


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("steps", "ratio"), [(0, 0.0), (4, 0.0), (0, 0.2), (4, 0.2)])
def test_what_depends_on_the_length_of_the_run_is_what_changes_with_it(kind: str, steps: int, ratio: float) -> None:
    def rates(length: int) -> list[float]:
        return [
            learning_rate(
                step,
                learning_rate=1.0,
                max_steps=length,
                lr_scheduler_type=kind,
                warmup_steps=steps,
                warmup_ratio=ratio,
            )
            for step in range(STEPS)
        ]

    assert depends_on_max_steps(kind, warmup_steps=steps, warmup_ratio=ratio) == (rates(STEPS) != rates(2 * STEPS))


def test_a_misspelt_schedule_is_refused_with_the_near_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        learning_rate(0, learning_rate=1.0, max_steps=STEPS, lr_scheduler_type="cosin")


def test_a_polynomial_that_would_rise_is_refused() -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        learning_rate(0, learning_rate=1e-7, max_steps=STEPS, lr_scheduler_type="polynomial")
