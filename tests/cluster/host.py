"""A cluster of several raylets on this machine, in a process of its own: pytest's may be connected to another Ray.

Reads one JSON list [operation, argument...] a line from standard input and answers each with one line; the end of the
input is the end of the cluster. With `--dashboard`, the head has its job server, and RAY_TMPDIR must be this cluster's
own: its jobs find their cluster by the address that Ray leaves there.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import ray._raylet
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

UNSHARE = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
SIZE = {"object_store_memory": 80 << 20, "include_dashboard": False}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class Host:
    """The operations."""

    def __init__(self, dashboard: bool) -> None:
        arguments: dict[str, Any] = {"num_cpus": 0, **SIZE}
        if dashboard:
            # Jobs are started by the agent, whose usual port another Ray on this machine may have.
            arguments |= {"include_dashboard": True, "dashboard_agent_listen_port": free_port()}
        # Or every `ray.init()` on this machine would come to this cluster.
        with nullcontext() if dashboard else patch("ray._private.utils.write_ray_address"):
            self.cluster = Cluster(initialize_head=True, head_node_args=arguments)
        self.nodes: dict[str, Any] = {}
        self.apart: subprocess.Popen[bytes] | None = None

    def add(self, cpus: int) -> str:
        """One more raylet; returns its id once the cluster knows it."""
        node = self.cluster.add_node(num_cpus=cpus, **SIZE)
        self.nodes[node.node_id] = node
        return node.node_id

    def add_apart(self, folder: str) -> None:
        """One more raylet, which has another volume at `folder` than all others."""
        ray = Path(sys.executable).with_name("ray")
        start = f"{ray} start --address={self.cluster.address} --num-cpus=1 --object-store-memory={80 << 20} --block"
        command = [*UNSHARE, "sh", "-c", f"mount -t tmpfs none {folder} && exec {start}"]
        before = self._alive()
        self.apart = subprocess.Popen(command, stdout=sys.stderr, stdin=subprocess.DEVNULL)
        for _ in range(1200):
            if self._alive() > before:
                return
            assert self.apart.poll() is None
            time.sleep(0.1)
        raise TimeoutError("the raylet does not come up")

    def remove_apart(self) -> None:
        """The end of that raylet and all its processes."""
        if self.apart is None:
            return
        processes = psutil.Process(self.apart.pid).children(recursive=True)
        self.apart.terminate()
        psutil.wait_procs(processes, timeout=20)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.apart.wait()
        self.apart = None

    def _alive(self) -> int:
        return sum(node["Alive"] for node in self.cluster.global_state.node_table())

    def kill(self, node: str) -> None:
        """kill -9 of a raylet and its agents."""
        self.cluster.remove_node(self.nodes.pop(node), allow_graceful=False)

    def remove(self, node: str) -> None:
        """The orderly end of a raylet; returns when the cluster knows of it."""
        self.cluster.remove_node(self.nodes.pop(node))
        self.cluster.wait_for_nodes()

    def drain(self, node: str) -> None:
        """Tell the cluster that a raylet is about to be preempted, as the autoscaler does."""
        client = ray._raylet.GcsClient(address=self.cluster.address)
        accepted, why = client.drain_node(
            node, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "a test", deadline_timestamp_ms=0
        )
        assert accepted, why

    def demand(self) -> int:
        """For how many replicas the autoscaler was asked to have room, as its first version is told."""
        client = ray._raylet.GcsClient(address=self.cluster.address)
        return len(json.loads(client.internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL, None) or b"[]"))


def main() -> None:
    """Serve until the input ends."""
    # So that the cluster is shut down too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    host = Host("--dashboard" in sys.argv)
    try:
        print(host.cluster.address, host.cluster.webui_url or "-", flush=True)
        for line in sys.stdin:
            operation, *arguments = json.loads(line)
            print(json.dumps(getattr(host, operation)(*arguments)), flush=True)
    finally:
        host.remove_apart()
        host.cluster.shutdown()


if __name__ == "__main__":
    main()
