"""Imported by every Python process that finds this folder on its path: makes replicas slow while a test wants it.

The file named by ZORAY_TEST_BRAKE holds a number of steps. Items of a later step take half a second longer, at no
cost of processor time: what a test does by hand then falls into the steps after that one, on any machine.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

LONGER = 0.5


class _AtImport(importlib.abc.MetaPathFinder):
    """Changes `actors.replica` when it is imported: most processes never do, and importing it takes seconds."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "actors.replica":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _slow(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _slow(module: Any) -> None:
    work, file = module.ReplicaActor.work, Path(os.environ["ZORAY_TEST_BRAKE"])

    def slowly(self: Any, request: bytes) -> bytes:
        if module.decode_request(request)[0].step >= int(file.read_text() or 0):
            time.sleep(LONGER)
        return work(self, request)

    module.ReplicaActor.work = slowly


if "ZORAY_TEST_BRAKE" in os.environ:
    sys.meta_path.insert(0, _AtImport())
