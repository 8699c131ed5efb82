"""What can be refused before anything is started: missing files and trackers, and more replicas than memory."""

from __future__ import annotations

import json
import os
import socket
from importlib.util import find_spec
from pathlib import Path

import psutil

from zoray.config import ResidentMemory, RunConfig, Zero3Memory
from zoray.errors import ConfigError, ResourceError, RunError
from zoray.runs import RunFolder
from zoray.stores import shown

PROCESS_BYTES = 400 << 20
"""What a replica's process takes beside the weights: the libraries, mostly."""

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_paths(config: RunConfig) -> None:
    """Look for the model and the data, and read the first rows.

    Raises:
        ModelError: there is no such model.
        DataError: there is no such file, it is empty, or its first rows have not what the task needs.
    """
    from zoray.models.source import check
    from zoray.tasks.base import require_examples
    from zoray.tasks.source import find_files, read_rows

    check(config)
    for path in (config.task.train, config.task.eval):
        if path is not None:
            first = next(read_rows(find_files(path), config.task.columns), None)
            require_examples(0 if first is None else 1, path)


def check_objective(config: RunConfig) -> None:
    """Import the user's function that is to be maximised, if there is one.

    Raises:
        ConfigError: it cannot be imported, or is no function.
    """
    if ":" in config.objective:
        from zoray.objective import load_function

        load_function(config.objective)


def check_snapshots(folder: RunFolder, config: RunConfig) -> None:
    """Refuse a place for a new run's snapshots that cannot be written, or that has those of another run.

    Raises:
        RunError: with what is wrong with it.
    """
    from zoray.shelf import shelf

    if config.snapshot_dir is None:
        return
    where = folder.snapshots_of(config)
    try:
        taken = shelf(where).anything()
        shelf(where).check()
    except OSError as error:
        advice = getattr(error, "advice", None) or "name a folder or an object store that every machine can write to"
        raise RunError(f"Snapshots cannot be kept there: {error}.", where="snapshot_dir", advice=advice) from error
    if taken:
        raise RunError(
            f"Something is already where the snapshots of {folder.name} would be: {', '.join(sorted(taken)[:3])}.",
            where=shown(str(where)),
            advice="choose another run_name or snapshot_dir, or delete them",
        )


def check_trackers(config: RunConfig) -> None:
    """Refuse experiment trackers that are not installed, where the coordinator will run on this machine.

    Raises:
        ConfigError: with what to install.
    """
    from actors.trackers import require

    if not os.environ.get("RAY_ADDRESS"):
        require(config)


def check_libraries(config: RunConfig) -> None:
    """Refuse sharded replicas without what they need, where they will run on this machine.

    Raises:
        ConfigError: with what to install.
    """
    if os.environ.get("RAY_ADDRESS") or not isinstance(config.memory, Zero3Memory):
        return
    for package in ("deepspeed", "accelerate"):
        if find_spec(package) is None:
            raise ConfigError(
                f"Sharded replicas need {package}, which is not installed.",
                where="memory",
                advice="Install it: pip install 'zoray[zero3]'.",
            )


def check_port(config: RunConfig) -> None:
    """Refuse a port for metrics that is taken, where the coordinator will run on this machine.

    Raises:
        ResourceError: another process listens on it.
    """
    if os.environ.get("RAY_ADDRESS") or not config.metrics_port:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", config.metrics_port))
        except OSError as error:
            raise ResourceError(
                f"Port {config.metrics_port} is already in use.",
                where="metrics_port",
                advice="choose another port, or 0 for any free one",
            ) from error


def check_memory(config: RunConfig, copies: int = 1) -> None:
    """Refuse to start more replicas on this machine than its free memory can hold, with so many copies of the weights.

    Only where the replicas will run here on processors, and the model is a local folder of safetensors.

    Raises:
        ResourceError: with the numbers.
    """
    weights = count_weights(Path(config.model))
    if weights is None or os.environ.get("RAY_ADDRESS") or config.gpus_per_replica:
        return
    each = host_bytes(config, weights * copies)
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


def host_bytes(config: RunConfig, weights: int) -> int:
    """What one replica takes of a machine's memory, but for activations; weights in files are in its page cache."""
    in_files = not isinstance(config.memory, ResidentMemory) and config.memory.offload == "nvme"
    return (0 if in_files else weights * _WIDTH[config.dtype]) + PROCESS_BYTES * config.shards


def count_weights(folder: Path) -> int | None:
    """Weights in a folder's safetensors files, by their headers; None if there are none that can be read."""
    files = sorted(folder.glob("*.safetensors"))
    total = 0
    for path in files:
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except (OSError, ValueError):
            return None
        for name, entry in header.items():
            if name != "__metadata__":
                count = 1
                for extent in entry["shape"]:
                    count *= extent
                total += count
    return total if files else None
