"""The key `estimator`, and what other keys must be for each of its values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from zoray.config.sections import fault

if TYPE_CHECKING:
    from zoray.config.schema import RunConfig

EstimatorName = Literal["spsa", "one_sided", "forward_gradient", "backprop"]
"""How a probe finds the slope of the loss along its direction; the classes are in `zoray.estimators`."""

DIFFERENTIATING = ("forward_gradient", "backprop")
"""Those that take derivatives of the loss, in place of differences."""


def check_estimator(config: RunConfig) -> None:
    """Raises a fault of the first key that does not go with the estimator."""
    name = config.estimator
    if name == "spsa":
        return
    if name == "one_sided" and config.directions_per_batch == 1:
        raise fault(
            "estimator",
            "One-sided probes share the loss at the weights themselves, which they can only on the same batch, and "
            "directions_per_batch is 1.",
            "Set directions_per_batch to 2 or more; from the number of directions on, all share one batch.",
        )
    if config.signs == "batched":
        raise fault(
            "signs",
            f"Estimator {name} has no two signs that one forward could have, and signs is batched.",
            "Leave signs out.",
        )
    if config.split_signs:
        why = "its evaluations are handed out one by one anyway" if name == "one_sided" else "it has no two signs"
        raise fault("split_signs", f"Nothing can be split of estimator {name}: {why}.", "Leave split_signs out.")
    if name not in DIFFERENTIATING:
        return
    if not config.differentiable:
        raise fault(
            "objective",
            f"Estimator {name} takes derivatives of what probes minimise, and {config.objective} has none.",
            "Set estimator to spsa or one_sided, or objective to loss.",
        )
    if config.head == "chunked":
        raise fault(
            "head",
            f"Estimator {name} takes derivatives of the head in one piece, and head is chunked.",
            "Leave head out: evaluations take it in slices where the model allows.",
        )
    if config.memory.kind != "resident":
        raise fault(
            "memory",
            f"Estimator {name} needs a replica's weights all in one place, and memory.kind is {config.memory.kind}.",
            "Set estimator to spsa or one_sided, or memory.kind to resident.",
        )
