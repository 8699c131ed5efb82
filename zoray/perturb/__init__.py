"""The perturbed forward: L(theta + eps z) and L(theta - eps z) without ever writing to a weight.

`context` holds the direction in force, `linear`, `embedding` and `norm` correct the outputs of the layers they know,
`swap` gives every other module a perturbed copy of its own parameters for the time of its call, and
`engine` installs them for the time of a probe. `zoray.proof` checks what the faster paths promise.
"""

from zoray.perturb.context import Active, NotBatchable, Signs
from zoray.perturb.engine import Engine

__all__ = ["Active", "Engine", "NotBatchable", "Signs"]
