"""Which computation a configuration describes, apart from where and how it is run."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from zoray.config.schema import RunConfig
from zoray.schedule import depends_on_max_steps


def schedule_needs_max_steps(config: RunConfig) -> bool:
    """True where the learning rate of a step depends on `max_steps`."""
    return depends_on_max_steps(
        config.lr_scheduler_type, warmup_steps=config.warmup_steps, warmup_ratio=config.warmup_ratio
    )


def mathematics(config: RunConfig) -> dict[str, Any]:
    """The keys that decide what is computed, flat (`task.max_length`), with JSON values.

    The model and the training data are not among them: where they lie decides nothing, and what they are is compared by
    digests (`zoray.identity`).

    Two runs with equal mathematics on like hardware have the same ledger. `max_steps` is among them only where the
    schedule depends on it: otherwise a longer run is the same run, continued.
    """
    flat: dict[str, Any] = {}
    _flatten(config, "", flat)
    if not schedule_needs_max_steps(config):
        del flat["max_steps"]
    return flat


BEFORE: dict[str, Any] = {
    "directions_per_batch": 1,
    "estimator": "spsa",
    "objective": "loss",
    "optimizer.shaping": "none",
    "optimizer.normalize": "none",
    "optimizer.momentum": 0.0,
    "optimizer.nesterov": False,
    "optimizer.momentum_window": None,
    "optimizer.max_directions": None,
}
"""What runs did that were begun before there were such keys: a ledger that has not one of them means this."""


def _flatten(section: BaseModel, prefix: str, flat: dict[str, Any]) -> None:
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if not isinstance(extra, dict) or extra["mathematics"] is not True:
            continue
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            _flatten(value, f"{prefix}{name}.", flat)
        else:
            flat[prefix + name] = value


def changed(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """The mathematical keys in which two configurations differ, as (key, old value, new value), in the schema's order.

    A key that only one of them has (the other has another kind of task, say) has the value None in the other.
    """
    before, after = mathematics(old), mathematics(new)
    if "max_steps" in before or "max_steps" in after:
        before["max_steps"], after["max_steps"] = old.max_steps, new.max_steps
    keys = dict.fromkeys([*before, *after])
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]
