"""From the projected gradients of a step to the weights of its directions: all of a run's optimizer.

Pure functions over explicit state, as in optax. The state after a step is a function of the commits up to it, so it
needs no checkpoint: a coordinator that resumes reads it from the end of the ledger. Replicas never hear of it.
"""

from __future__ import annotations

from zoray.optim.optimizer import SGD, Normalize, Optimizer, OptimizerState, Update
from zoray.optim.shaping import Shaping
from zoray.optim.width import Width

__all__ = ["SGD", "Normalize", "Optimizer", "OptimizerState", "Shaping", "Update", "Width"]
