"""From a run's configuration to what the kernel needs of it."""

from __future__ import annotations

from zoray.config import RunConfig
from zoray.protocol import Settings
from zoray.stores import is_uri

_SNAPSHOT_AFTER = 5.0
"""Seconds of replay after which a snapshot is due, unless `save_steps` says otherwise."""


STORE_PATIENCE = 3600.0
"""Seconds that what goes to or from an object store may take; one that is dead is noticed in half a minute."""


def settings(config: RunConfig, eval_shards: int) -> Settings:
    """What the kernel needs of a configuration."""
    return Settings(
        max_steps=config.max_steps,
        directions=config.directions,
        learning_rate=config.rate_at,
        microbatches=config.microbatches,
        weight_decay=config.weight_decay,
        max_projected_gradient=config.max_projected_gradient,
        optimizer=config.update_rule,
        eval_steps=config.eval_steps,
        eval_shards=eval_shards,
        eval_on_start=config.eval_on_start,
        save_steps=config.save_steps,
        snapshot_after=_SNAPSHOT_AFTER,
        snapshot_patience=STORE_PATIENCE if is_uri(config.snapshot_dir or "") else 0.0,
        digest_every=config.digest_every,
        max_skipped_steps=config.max_skipped_steps,
        split_signs=config.split_signs,
        one_sided=config.estimator == "one_sided",
        directions_per_batch=config.directions_per_batch,
        by_batch=config.estimator == "backprop" and config.directions_per_batch > 1,
        epsilon=config.epsilon,
    )
