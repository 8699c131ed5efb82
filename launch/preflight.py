"""What can be refused before anything is started: missing files, and more replicas than memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil

from zoray.config import RunConfig
from zoray.errors import ResourceError

_PROCESS_BYTES = 400 << 20
"""What a replica's process takes beside the weights: the libraries, mostly."""

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_paths(config: RunConfig) -> None:
    """Look for the model and the data.

    Raises:
        ModelError: there is no such model.
        DataError: there is no such file.
    """
    from zoray.models.source import find
    from zoray.tasks.source import find_files

    find(config)
    for path in (config.task.train, config.task.eval):
        if path is not None:
            find_files(path)


def check_memory(config: RunConfig) -> None:
    """Refuse to start more replicas on this machine than its free memory can hold.

    Only where the replicas will run here on processors, and the model is a local folder of safetensors.

    Raises:
        ResourceError: with the numbers.
    """
    weights = count_weights(Path(config.model))
    if weights is None or os.environ.get("RAY_ADDRESS") or config.gpus_per_replica:
        return
    each = weights * _WIDTH[config.dtype] + _PROCESS_BYTES
    free = psutil.virtual_memory().available
    minimum, maximum, wanted = config.replica_limits
    replicas = wanted if maximum is None else minimum
    if each * replicas > free:
        raise ResourceError(
            f"{replicas} replicas of {each / 2**30:.1f} GiB need {each * replicas / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free.",
            where="replicas",
            advice=f"use at most {free // each} replicas on this machine, or a shorter dtype",
        )


def count_weights(folder: Path) -> int | None:
    """Weights in a folder's safetensors files, by their headers; None if there are no such files."""
    files = sorted(folder.glob("*.safetensors"))
    total = 0
    for path in files:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(size))
            except ValueError:
                return None
        for name, entry in header.items():
            if name != "__metadata__":
                count = 1
                for extent in entry["shape"]:
                    count *= extent
                total += count
    return total if files else None
