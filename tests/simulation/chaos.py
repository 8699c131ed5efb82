"""What goes wrong in a schedule, drawn from its seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from tests.simulation.model import Problem
from zoray.optim import Optimizer, Width
from zoray.protocol import Settings

NEVER = 1e9


class InvariantError(AssertionError):
    """The simulation caught a fault of the protocol."""


@dataclass(frozen=True)
class Chaos:
    """What goes wrong in one schedule; times are in units of about one probe."""

    loss: float
    duplication: float
    delay: float
    crash_every: float
    silent: float
    freeze_every: float
    failing: float
    cut: float
    between_actions: float
    stop_every: float
    scale_every: float
    lone: bool


def _probes(share: float) -> dict[str, Any]:
    """What probes are made of, how many are on a batch, and in which order they are handed out."""
    return {
        "split_signs": share < 0.25,
        "one_sided": 0.25 <= share < 0.5,
        "by_batch": 0.5 <= share < 0.6,
        "directions_per_batch": 1 + int(share * 100) % 5,
    }


def draw(rng: random.Random) -> tuple[Problem, Chaos, int]:
    """A problem, its faults and the number of replicas."""
    max_steps = rng.choice([0, 1, 4, 6, 8])
    settings = Settings(
        max_steps=max_steps,
        directions=rng.choice([1, 2, 4, 7]),
        microbatches=rng.choice([1, 1, 2]),
        learning_rate=lambda step: 0.01 / (1 + step),
        weight_decay=rng.choice([0.0, 0.1]),
        max_projected_gradient=rng.choice([None, 2.0]),
        eval_steps=rng.choice([None, 2, 3]),
        eval_shards=rng.choice([0, 1, 3]),
        eval_on_start=rng.random() < 0.5,
        save_steps=rng.choice([None, 2]),
        digest_every=rng.choice([None, None, 1, 3]),
        digest_share=rng.choice([0.01, 0.5]),
        prove_newcomers=rng.random() < 0.8,
        snapshot_after=rng.choice([None, 2.0]),
        max_skipped_steps=2,
        late_minimum=1.5,
        first_deadline=6.0,
        max_misses=4,
        short_probe=rng.choice([0.0, 3.0, 100.0]),
        **_probes(rng.random()),
    )
    broken_steps = range(0)
    if rng.random() < 0.15:
        start = rng.randint(0, max_steps)
        broken_steps = range(start, start + rng.randint(1, 3))
    problem = Problem(settings, rng.choice([0, 0, 0, 5]), broken_steps)
    chaos = Chaos(
        loss=rng.choice([0.0, 0.0, 0.05, 0.3]),
        duplication=rng.choice([0.0, 0.1, 0.5]),
        delay=rng.choice([0.01, 0.3, 3.0]),
        crash_every=rng.choice([NEVER, 10.0, 3.0, 1.0]),
        silent=rng.choice([0.0, 0.3, 1.0]),
        freeze_every=rng.choice([NEVER, 10.0]),
        failing=rng.choice([0.0, 0.0, 0.05]),
        cut=rng.choice([0.0, 0.5, 1.0, 1.0]),
        between_actions=rng.choice([0.0, 0.02, 0.05]),
        stop_every=rng.choice([NEVER, NEVER, 20.0]),
        scale_every=rng.choice([NEVER, 8.0]),
        lone=rng.random() < 0.15,
    )
    replicas = rng.choice([1, 2, 3, 5, 8])
    optimizer = Optimizer(
        normalize=rng.choice(["none", "second_moment", "none" if settings.by_batch else "curvature"]),
        momentum=(momentum := rng.choice([0.0, 0.5])),
        nesterov=momentum > 0 and rng.random() < 0.5,
        width=Width(settings.directions, 2 * settings.directions + 1) if rng.random() < 0.5 else None,
    )
    return replace(problem, settings=replace(settings, optimizer=optimizer)), chaos, replicas
