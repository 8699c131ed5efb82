"""The fleet: the machines of the cluster, and the processes of the replicas on them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.inbox import Reference
from actors.replica import ReplicaActor
from zoray.config import RunConfig
from zoray.errors import ResourceError
from zoray.protocol.machines import NodeView

_LOOK_EVERY = 1.0
_log = logging.getLogger(__name__)


class Fleet:
    """The replicas of one run, by name; which of them there are is decided elsewhere (`zoray.protocol.membership`).

    Args:
        config: of the run.
        snapshots: folder or URI where replicas save and look for snapshots.
        embedded: Ray runs on this machine for this run alone: more replicas than cores are slower, not refused.
    """

    actor: ClassVar[type[ReplicaActor]] = ReplicaActor

    def __init__(self, config: RunConfig, snapshots: Path | str, embedded: bool = False) -> None:
        self.config, self._snapshots, self._embedded = config, str(snapshots), embedded
        self._needs = config.needs
        self._actors: dict[str, tuple[Any, ...]] = {}
        self._closed = threading.Event()
        self._announced = 0

    def __contains__(self, name: str) -> bool:
        return name in self._actors

    def hold(self, config: RunConfig) -> None:
        """Start replicas with this configuration from now on, which differs in `memory` alone."""
        self.config, self._needs, self._announced = config, config.needs, 0

    def width(self, name: str) -> int:
        """How many processes a replica has."""
        return len(self._actors[name])

    def start(self, name: str, node: str) -> None:
        """Start the processes of a replica on a machine."""
        self._actors[name] = tuple(self._create(name, rank, node) for rank in range(self.config.shards))

    def end(self, name: str) -> None:
        """End a replica's processes, whatever they are doing: one may be waiting for another that is dead."""
        for actor in self._actors.pop(name, ()):
            self._kill(actor)

    def call(self, name: str, method: str, *arguments: Any) -> tuple[Reference, ...]:
        """Call a method of `ReplicaActor` in each of a replica's processes; the references give the results.

        Ray runs what one caller asks of an actor in the order in which it was asked, so all processes of a replica do
        the same things in the same order, as they must.
        """
        return tuple(getattr(actor, method).remote(*arguments) for actor in self._actors[name])

    def introduce(self, name: str) -> tuple[Reference, ...]:
        """Let a replica load the model and the data; its processes find each other through the first one's meeting."""
        return self.call(name, "introduce", self._actors[name][0].meet.remote())

    def work(self, name: str, requests: Sequence[bytes]) -> tuple[Reference, ...]:
        """Send one request to each process; where there are more of these, the others help with the last one's item."""
        last = len(requests) - 1
        return tuple(actor.work.remote(requests[min(rank, last)]) for rank, actor in enumerate(self._actors[name]))

    def close(self) -> None:
        """End every replica, and stop looking at the cluster."""
        self._closed.set()
        for name in list(self._actors):
            self.end(name)

    def machines(self) -> tuple[NodeView, ...]:
        """The machines of the cluster as they are now: what room they have, and which of them are about to leave."""
        # Nothing public gives these two in every version of Ray we support; they take milliseconds, for any size.
        from ray._private.state import available_resources_per_node, state

        free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
        drains = getattr(state, "get_draining_nodes", None)
        draining = drains() if drains is not None else {}
        views = []
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            if node["Alive"]:
                name = node["NodeID"]
                views.append(NodeView(name, self._room(free.get(name, {})), draining=name in draining))
        return tuple(views)

    def watch(self, tell: Callable[[tuple[NodeView, ...], RunConfig], None]) -> None:
        """Look at the machines about once a second, in the background, until `close`.

        What is told with them is the configuration of the replicas that they were seen to have room for.
        """

        def look() -> None:
            while not self._closed.wait(_LOOK_EVERY):
                try:
                    config = self.config
                    tell(self.machines(), config)
                except Exception as error:  # the head may be restarting; the next look will tell
                    _log.warning("the cluster cannot be looked at: %s", error)

        threading.Thread(target=look, daemon=True, name="machines").start()

    def announce(self, count: int) -> None:
        """Tell Ray's autoscaler for how many replicas there should be room; 0 takes it back."""
        if self._embedded or count == self._announced:
            return
        from ray.autoscaler.sdk import request_resources

        bundle = {kind: amount for kind, amount in self._needs.items() if amount > 0}
        try:
            request_resources(bundles=[bundle] * count)
            self._announced = count
        except Exception as error:  # without an autoscaler to hear it nothing is lost
            _log.warning("the autoscaler cannot be told of %d replicas: %s", count, error)

    def shortage(self) -> ResourceError:
        """That no machine has room for a single replica, with the numbers."""
        wanted = [(kind, amount) for kind, amount in self._needs.items() if amount > 0]
        need = " and ".join(f"{amount:g} {kind}" for kind, amount in wanted)
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        alive = [node["Resources"] for node in nodes if node["Alive"]]
        totals = [", ".join(f"{all_of.get(kind, 0):g} {kind}" for kind, _ in wanted) for all_of in alive]
        # Ray has them in no order.
        have = "; ".join(sorted(totals, reverse=True))
        return ResourceError(
            f"A replica needs {need}, which no machine of the cluster has free; their totals are: {have}.",
            where="threads_per_replica, gpus_per_replica, memory.shards",
            advice="ask for less per replica, wait for other work to end, or add machines",
        )

    def _room(self, free: dict[str, float]) -> int:
        if self._embedded:
            return 1 << 16
        return min(int(free.get(kind, 0.0) / amount + 1e-9) for kind, amount in self._needs.items() if amount > 0)

    def _create(self, name: str, rank: int, node: str) -> Any:
        options = {
            "num_cpus": 0 if self._embedded else self.config.threads_per_replica,
            "num_gpus": self.config.gpus_per_replica,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }
        # Ray makes a class remote at run time, behind the back of any type checker.
        remote: Any = ray.remote(self.actor)
        return remote.options(**options).remote(name, self.config, self._snapshots, rank)

    def _kill(self, actor: Any) -> None:
        ray.kill(actor)
