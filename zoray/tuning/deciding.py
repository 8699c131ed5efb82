"""The one place where the results of a trial's step become its commit."""

from __future__ import annotations

from collections.abc import Sequence

from zoray.aggregate import Aggregate, ProbeResult, aggregate
from zoray.config import RunConfig
from zoray.optim import OptimizerState
from zoray.tuning.grid import Trial
from zoray.tuning.race import Rules


def rules_of(config: RunConfig, eval_shards: int) -> Rules:
    """What the kernel needs of a configuration, whose learning rate and epsilon do not count."""
    optimizer = config.update_rule

    def directions(known: OptimizerState) -> int:
        return config.directions if known.width is None else known.width.directions

    def decide(
        trial: Trial, step: int, results: Sequence[ProbeResult], previous: bytes, known: OptimizerState
    ) -> Aggregate:
        """The commit that a run of this configuration and trial would make: the schedule is that of the whole run."""
        return aggregate(
            step,
            results,
            directions=directions(known),
            microbatches=config.microbatches,
            learning_rate=config.rate_at(step, trial.learning_rate),
            weight_decay=config.weight_decay,
            max_projected_gradient=config.max_projected_gradient,
            previous=previous,
            optimizer=optimizer,
            state=known,
        )

    return Rules(
        rows=config.directions * config.microbatches * config.per_direction_batch_size,
        eval_shards=eval_shards,
        initial=optimizer.initial(),
        probes=lambda known: directions(known) * config.microbatches,
        decide=decide,
        after=optimizer.after,
    )


def passes_per_step(config: RunConfig) -> int:
    """Forward passes of a step, each over `per_direction_batch_size` rows; a backward pass counts as two.

    With an adaptive number of directions, of a step that has the fewest.
    """
    batches = config.batches_of(config.directions)
    per_batch, per_direction = {
        "spsa": (0, 2),
        "one_sided": (1, 1),
        "forward_gradient": (0, 2),
        "backprop": (3, 0),
    }[config.estimator]
    passes = config.microbatches * (batches * per_batch + config.directions * per_direction)
    return passes + int(config.update_rule.wants_curvature)
