"""Where a replica's weights live, and what is done to them there.

`base` says what a memory is. `resident` holds all weights where the model computes, `streamed` brings them there block
by block, `zero3` has a part of them in each of several processes; `pieces` writes those of any memory to files that any
other reads. Of `streamed`, `units` are what is brought in at once, `away` what parameters are meanwhile, `backing` is
where they lie, `carrier` brings them, and `spill` loads them.
"""

from zoray.memory.base import Memory
from zoray.memory.resident import Resident, align

__all__ = ["Memory", "Resident", "align"]
