"""How a probe finds the slope of the loss along its direction; all give the same scalars.

`spsa` and `one_sided` take differences of losses beside the weights, `forward` (with `tangents`) and `backward`
differentiate. `base` is what they have in common.
"""

from __future__ import annotations

from zoray.estimators.backward import Backprop
from zoray.estimators.base import Estimator, EstimatorName
from zoray.estimators.forward import ForwardGradient
from zoray.estimators.one_sided import OneSided
from zoray.estimators.spsa import Spsa

ESTIMATORS: dict[EstimatorName, type[Estimator]] = {
    "spsa": Spsa,
    "one_sided": OneSided,
    "forward_gradient": ForwardGradient,
    "backprop": Backprop,
}
"""The class of each name that the configuration's `estimator` may have."""

__all__ = ["ESTIMATORS", "Backprop", "Estimator", "EstimatorName", "ForwardGradient", "OneSided", "Spsa"]
