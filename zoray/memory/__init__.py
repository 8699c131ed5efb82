"""Where a replica's weights live, and what is done to them there.

`base` says what a memory is, `resident` holds all weights in one process, `zero3` a part of them in each of several;
`pieces` writes the weights of any memory to files that any other reads.
"""

from zoray.memory.base import Memory
from zoray.memory.resident import Resident, align

__all__ = ["Memory", "Resident", "align"]
