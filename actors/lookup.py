"""Metrics that are looked up when Prometheus asks: they cost nothing while nobody does.

What a replica lags behind is in the kernel's state already. Its memory is asked for at each scrape, and the answer is
there for the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import psutil
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from zoray.protocol import State


class Lookup(Collector):
    """The lag and the memory of each replica, and the coordinator's own memory.

    Args:
        run: name of the run.

    Attributes:
        state: the kernel's latest; one that was shown here is never changed.
        asked: whether somebody has asked since this was set to False.
    """

    def __init__(self, run: str) -> None:
        self.state: State | None = None
        self.asked = False
        self._run, self._process = run, psutil.Process()
        self._memory: dict[str, Mapping[str, int]] = {}

    def weighed(self, replica: str, memory: Mapping[str, int]) -> None:
        """A replica has said how much memory it takes: bytes by kind."""
        members = self.state.members if self.state is not None else {}
        # A new dictionary, because a scrape may be reading the old one.
        self._memory = {name: old for name, old in self._memory.items() if name in members} | {replica: memory}

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """The families without values."""
        text = "Committed steps a replica is not known to hold."
        yield GaugeMetricFamily("zoray_replica_lag_steps", text, labels=["run", "replica"])
        text = "Memory of a replica's process, by kind."
        yield GaugeMetricFamily("zoray_replica_memory_bytes", text, labels=["run", "replica", "kind"])
        yield GaugeMetricFamily("zoray_coordinator_memory_bytes", "Memory of the coordinator.", labels=["run"])

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The families with the values of this moment."""
        self.asked = True
        lag, memory, own = self.describe()
        state, sizes = self.state, self._memory
        if state is not None:
            for name, member in state.members.items():
                lag.add_metric([self._run, name], state.step - member.held)
                for kind, size in sizes.get(name, {}).items():
                    memory.add_metric([self._run, name, kind], size)
        own.add_metric([self._run], self._process.memory_info().rss)
        return lag, memory, own
