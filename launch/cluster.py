"""Getting to a Ray cluster: the one we are on, the one `RAY_ADDRESS` names, or an embedded one on this machine."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

from zoray.config import RunConfig
from zoray.errors import ResourceError

_OBJECT_STORE = 100 << 20


def connect(config: RunConfig) -> str:
    """Start or join Ray; returns a few words saying which.

    Raises:
        ResourceError: the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    import ray

    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError) as error:
            raise ResourceError(
                f"The Ray cluster cannot be reached: {error}.",
                where=f"RAY_ADDRESS={address}",
                advice="check the address, or unset RAY_ADDRESS to run on this machine alone",
            ) from error
        return f"the Ray cluster at {address}"
    cores = os.cpu_count() or 1
    wanted = config.replicas * config.threads_per_replica
    # Ray counts processors to place actors; more replicas than cores is slower, not wrong.
    ray.init(
        num_cpus=max(cores, wanted),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE,
        **quiet,
    )
    shared = f", {wanted} threads on {cores} cores" if wanted > cores else ""
    return f"an embedded Ray on this machine{shared}"
