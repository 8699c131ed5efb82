"""The one place where the results of a trial's step become its commit."""

from __future__ import annotations

from collections.abc import Sequence

from zoray.aggregate import Aggregate, ProbeResult, aggregate
from zoray.config import RunConfig
from zoray.schedule import learning_rate
from zoray.tuning.grid import Trial
from zoray.tuning.race import Known, Rules


def rules_of(config: RunConfig, eval_shards: int) -> Rules:
    """What the kernel needs of a configuration, whose learning rate and epsilon do not count."""

    def decide(trial: Trial, step: int, results: Sequence[ProbeResult], previous: bytes, known: Known) -> Aggregate:
        """The commit that a run of this configuration and trial would make: the schedule is that of the whole run."""
        rate = learning_rate(
            step,
            learning_rate=trial.learning_rate,
            max_steps=config.max_steps,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_steps,
            warmup_ratio=config.warmup_ratio,
        )
        return aggregate(
            step,
            results,
            directions=config.directions,
            microbatches=config.microbatches,
            learning_rate=rate,
            weight_decay=config.weight_decay,
            max_projected_gradient=config.max_projected_gradient,
            previous=previous,
        )

    probes = config.directions * config.microbatches
    return Rules(
        rows=probes * config.per_direction_batch_size,
        eval_shards=eval_shards,
        # Plain stochastic gradient descent has nothing to know.
        initial=None,
        probes=lambda known: probes,
        decide=decide,
        after=lambda known, commit: known,
    )


def passes_per_step(config: RunConfig) -> int:
    """Forward passes of a step, each over `per_direction_batch_size` rows."""
    return 2 * config.directions * config.microbatches
