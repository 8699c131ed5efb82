"""Zoray: fine-tuning of language models without backpropagation, on machines that come and go.

The deterministic core. It imports no Ray, and is usable from a plain script: see `Replica` and `commit`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoray.aggregate import ProbeResult, commit
    from zoray.commits import Commit
    from zoray.errors import ZorayError
    from zoray.ledger import Ledger
    from zoray.loss import RowLosses
    from zoray.optim import Optimizer, Width
    from zoray.replica import Replica
    from zoray.selection import Rotation, SmallWeights

__all__ = [
    "Commit",
    "Ledger",
    "Optimizer",
    "ProbeResult",
    "Replica",
    "Rotation",
    "RowLosses",
    "SmallWeights",
    "Width",
    "ZorayError",
    "__version__",
    "commit",
]
__version__ = "0.1.0"

_HOMES = {
    "Commit": "zoray.commits",
    "Ledger": "zoray.ledger",
    "Optimizer": "zoray.optim",
    "ProbeResult": "zoray.aggregate",
    "Replica": "zoray.replica",
    "Rotation": "zoray.selection",
    "RowLosses": "zoray.loss",
    "SmallWeights": "zoray.selection",
    "Width": "zoray.optim",
    "ZorayError": "zoray.errors",
    "commit": "zoray.aggregate",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `zoray --help` does not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'zoray' has no attribute {name!r}")
