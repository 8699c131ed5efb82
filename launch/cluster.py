"""Getting to a Ray cluster: the one we are on, the one `RAY_ADDRESS` names, or an embedded one on this machine."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any

from zoray.config import RunConfig
from zoray.errors import ResourceError

NAMESPACE = "zoray"
"""Of Ray, in which coordinators have names: other processes find a run by it."""

_OBJECT_STORE = 100 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run runs: in words, and whether Ray was started for it alone."""

    words: str
    embedded: bool


def connect(config: RunConfig) -> Place:
    """Start or join Ray; a connection there already is used and kept.

    Raises:
        ResourceError: the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    import ray

    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    if address and address.startswith(("http://", "https://")):
        raise ResourceError(
            "RAY_ADDRESS is the address of a job server, and a run in this process needs that of Ray.",
            where=f"RAY_ADDRESS={address}",
            advice="start the run with `zoray submit`, or unset RAY_ADDRESS to run on this machine alone",
        )
    if address:
        try:
            if not ray.is_initialized():
                ray.init(address=address, namespace=NAMESPACE, **quiet)
        except (ConnectionError, RuntimeError) as error:
            raise ResourceError(
                f"The Ray cluster cannot be reached: {error}.",
                where=f"RAY_ADDRESS={address}",
                advice="check the address, or unset RAY_ADDRESS to run on this machine alone",
            ) from error
        return Place(f"the Ray cluster at {address}", embedded=False)
    cores = os.cpu_count() or 1
    minimum, maximum, wanted = config.replica_limits
    threads = (wanted if maximum is None else minimum) * int(config.needs["CPU"])
    # Not one that `ray start` has left behind here: whoever means that one says so by RAY_ADDRESS.
    ray.init(
        address="local",
        namespace=NAMESPACE,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE,
        **quiet,
    )
    shared = f", {threads} threads on {cores} cores" if threads > cores else ""
    return Place(f"an embedded Ray on this machine{shared}", embedded=True)
