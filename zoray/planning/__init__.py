"""What a run will need, before anything is loaded.

`live` counts the bytes of living tensors, `shadow` runs a model on tensors without memory, `gathered` adds what
ZeRO-3's gathering takes, `work` measures with them what a replica's process does, `needs` adds that up for each way of
keeping the weights, and `fit` compares it with machines and looks for changes that fit.
"""

from zoray.planning.fit import Change, Fit, Machine, Plan, Planner
from zoray.planning.needs import Need, Place, needs, storage
from zoray.planning.work import Work, measure

__all__ = ["Change", "Fit", "Machine", "Need", "Place", "Plan", "Planner", "Work", "measure", "needs", "storage"]
