"""One attempt of a RayJob: a Ray cluster of pods, made, changed and deleted as the operator and the autoscaler do."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from tests.cluster.helpers import Driver, Result, ledger_of, until
from tests.cluster.rehearsal.kubelet import Running
from tests.cluster.rehearsal.kuberay import DASHBOARD, GCS, Object, RayCluster
from tests.cluster.rehearsal.scene import Scene, say
from zoray.ledger import Ledger
from zoray.runs import RunFolder


class Attempt:
    """A cluster whose pods are ready, and to which the job was submitted.

    Attributes:
        cluster: what the operator makes its pods from.
        head, workers: the pods that were not taken away.
        run: the submitter's pod, by what it says, and the run's folder.
    """

    def __init__(self, scene: Scene, job: Object) -> None:
        self.cluster, self._scene = RayCluster.of(job), scene
        self.head = self._head()
        group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
        self.workers = [self._worker() for _ in range(group["replicas"])]
        say(f"RayCluster {self.cluster.name}: pods of the head and of {group['replicas']} worker start")
        for running in (self.head, *self.workers):
            say(f"  {running.name}: {running.command}")
        for running in (self.head, *self.workers):
            running.until_ready()
        say("  they are ready, as their probes have it")
        self.run = self._submitted()

    @property
    def http(self) -> str:
        """Address of the head's job server."""
        return f"http://{self.head.ip}:{DASHBOARD}"

    def asked(self) -> int:
        """For how many replicas the autoscaler v2 is told to have room."""
        told = self._state().cluster_resource_constraints
        return sum(request.count for constraint in told for request in constraint.resource_requests)

    def scaled_up(self) -> Running:
        """One more worker pod, as by the autoscaler."""
        self.workers.append(self._worker())
        return self.workers[-1]

    def scaled_down(self, running: Running) -> None:
        """A worker pod less, as by the autoscaler: its raylet leaves if it is idle, then the pod is deleted."""
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        (node,) = (node for node in self._state().node_states if node.instance_id == running.name)
        idle = DrainNodeReason.DRAIN_NODE_REASON_IDLE_TERMINATION
        until(lambda: self._gcs().drain_node(node.node_id.hex(), idle, "a rehearsal", 0)[0], f"{running.name} is idle")
        self.workers.remove(running)
        running.terminate()

    def beheaded(self) -> int:
        """The head is gone at once, with coordinator and driver; returns the first step that is not committed."""
        self.head.kill()
        status = self.run.ends()
        with Ledger.open(self.run.folder.ledger, repair=False) as ledger:
            step = ledger.next_step
        say(f"{self.head.name} is killed with kill -9, at step {step}; the submitter ends with status {status}")
        assert status != 0
        return step

    def headed(self) -> None:
        """A new head for the same cluster and, instead of the submitter that failed, another."""
        self.head = self._head()
        say(f"submitterConfig.backoffLimit: {self.head.name} is started for the same cluster")
        self.head.until_ready()
        self.run = self._submitted()

    def replaced(self) -> None:
        """Wait until every worker pod has ended by itself, having lost its head; each is followed by another."""
        began, lost = time.monotonic(), self.workers
        self.workers = []
        for running in lost:
            until(lambda running=running: not running.alive(), f"the end of {running.name}, whose head is gone")
            say(f"  {running.name} has ended by itself, {time.monotonic() - began:.0f} s later")
            say(f"  {self.scaled_up().name} is started instead")

    def hosts(self, status: dict[str, Any]) -> list[str]:
        """The pods in which there are active replicas, one in each worker pod, or none if it is otherwise yet."""
        hosts = [replica["host"] for replica in status["replicas"] if replica["state"] == "active"]
        return sorted(hosts) if Counter(hosts) == Counter(running.name for running in self.workers) else []

    def delete(self) -> None:
        """Delete all its pods; they have yet to end."""
        for running in (self.head, *self.workers):
            if running.alive():
                running.terminate()

    def deleted(self) -> None:
        """Wait until all its pods have ended."""
        for running in (self.head, *self.workers):
            if running.asked is not None:
                say(f"  {running.name} ends {running.terminated():.0f} s after SIGTERM")

    def result(self) -> Result:
        """What came of the run."""
        last = list(self.run.folder.rows("digests"))[-1]
        return Result(ledger_of(self.run.folder), last["step"], last["digest"])

    def _head(self) -> Running:
        return self._scene.kubelet.run(self.cluster.head(), self.cluster.service)

    def _worker(self) -> Running:
        return self._scene.kubelet.run(self.cluster.worker())

    def _submitted(self) -> Driver:
        running = self._scene.kubelet.run(self.cluster.submitter())
        say(f"  {running.name} submits the entrypoint as {self.cluster.submission}")
        run = self.cluster.job["metadata"]["name"]
        return Driver(running.process, running.said, RunFolder(self._scene.volume / "runs" / run))

    def _gcs(self) -> Any:
        from ray._raylet import GcsClient

        return GcsClient(address=f"{self.head.ip}:{GCS}")

    def _state(self) -> Any:
        from ray.autoscaler.v2.sdk import get_cluster_resource_state

        return get_cluster_resource_state(self._gcs())
