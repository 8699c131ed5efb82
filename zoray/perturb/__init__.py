"""The perturbed forward: L(theta + eps z) and L(theta - eps z) without ever writing to a weight.

`context` holds the direction in force, `linear`, `embedding` and `norm` correct the outputs of the layers they know,
`swap` gives every other module a perturbed copy of its own parameters for the time of its call, and
`engine` installs them for the time of a probe. `record` finds out which of the tensors that modules exchange have the
rows of the batch, and `rows` says what is known of each. `zoray.proof` checks what the faster paths promise.
"""

from zoray.perturb.context import Active, NotBatchable, Signs
from zoray.perturb.engine import Engine
from zoray.perturb.record import find_rows
from zoray.perturb.rows import Rows

__all__ = ["Active", "Engine", "NotBatchable", "Rows", "Signs", "find_rows"]
