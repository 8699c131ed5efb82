"""The fleet: creates replicas as Ray actors, gives them requests, ends them."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.replica import Introduction, ReplicaActor
from zoray.config import RunConfig
from zoray.errors import ResourceError, RunError, ZorayError

Reference = Any
"""A `ray.ObjectRef`; Ray's own type is not generic in every version we support."""


class Fleet:
    """The replicas of one run, by name.

    Args:
        config: of the run.
        snapshots: folder in which replicas save and look for snapshots.
    """

    def __init__(self, config: RunConfig, snapshots: str) -> None:
        self._config, self._snapshots = config, snapshots
        self._actors: dict[str, Any] = {}
        self._started = 0

    def start(self, count: int) -> dict[str, Introduction]:
        """Create replicas and wait until they have loaded the model; each introduces itself.

        Raises:
            ResourceError: the cluster has not enough processors or accelerators, or a replica died while loading.
            ZorayError: what a replica found wrong with the model, the data or the configuration.
        """
        self._check_resources(count)
        remote = ray.remote(ReplicaActor)
        options = {
            "num_cpus": self._config.threads_per_replica,
            "num_gpus": self._config.gpus_per_replica,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        for _ in range(count):
            name = f"r{self._started}"
            self._started += 1
            self._actors[name] = remote.options(**options).remote(name, self._config, self._snapshots)
        waiting = {name: self._actors[name].introduce.remote() for name in self._actors}
        return {name: receive(reference, name) for name, reference in waiting.items()}

    def join(self, name: str, genesis: bytes, run: str, next_step: int) -> Reference:
        """Tell a replica which run it takes part in; the reference gives the step it holds, and warnings."""
        return self._actors[name].join.remote(genesis, run, next_step)

    def send(self, name: str, request: bytes) -> Reference:
        """Send a request; the reference gives the answer's bytes."""
        return self._actors[name].work.remote(request)

    def remove(self, name: str) -> None:
        """End a replica's process."""
        actor = self._actors.pop(name, None)
        if actor is not None:
            ray.kill(actor)

    def close(self) -> None:
        """End every replica."""
        for name in list(self._actors):
            self.remove(name)

    def _check_resources(self, count: int) -> None:
        have = ray.cluster_resources()  # type: ignore[no-untyped-call]
        needs = {"CPU": self._config.threads_per_replica, "GPU": self._config.gpus_per_replica}
        for kind, each in needs.items():
            if each * count > have.get(kind, 0.0):
                raise ResourceError(
                    f"{count} replicas of {each:g} {kind} need {each * count:g} {kind}, "
                    f"the cluster has {have.get(kind, 0):g}.",
                    where=f"replicas, {'threads' if kind == 'CPU' else 'gpus'}_per_replica",
                    advice="ask for fewer replicas, or add machines",
                )


def receive(reference: Reference, name: str) -> Any:
    """What a replica answered.

    Raises:
        ZorayError: what the replica raised, as it was before Ray wrapped it.
        ResourceError: its process died.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, ZorayError):
            raise error.cause from None
        raise RunError(
            f"Replica {name} failed: {error.cause!r}.", advice="the traceback is in the logs of Ray (ray logs)"
        ) from error
    except RayActorError as error:
        raise ResourceError(
            f"Replica {name} died: {first_line(error)}",
            advice="it may have run out of memory: use fewer replicas per machine or a shorter dtype",
        ) from error


def first_line(error: RayError) -> str:
    """The first line of an error of Ray, which the user can read."""
    return str(error).strip().splitlines()[0]
