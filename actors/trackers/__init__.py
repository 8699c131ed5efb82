"""Experiment trackers: TensorBoard, MLflow and Weights & Biases behind one small interface.

`report_to` names them, as in Hugging Face's trainer. The journal tells `Trackers` of every step and evaluation; every
`logging_steps` steps their means go on to each tracker, in a thread of its own (`feed.py`): one that fails or hangs is
dropped with a warning, and the run never waits for it. `docs/metrics.md` lists the names of what they are told.
"""

from __future__ import annotations

from actors.trackers.base import Tracker, chosen, installed, require
from actors.trackers.reports import Trackers

__all__ = ["Tracker", "Trackers", "chosen", "installed", "require"]
