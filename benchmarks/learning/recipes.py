"""The scripts under `configs/` that make data, as modules."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[2] / "configs"


@cache
def recipe(name: str) -> Any:
    """The script configs/NAME.py, loaded under a name of its own: several are called `make_data`."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name.replace('/', '_')}", CONFIGS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
