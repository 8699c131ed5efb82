"""What being watched costs: the size of a scrape, and the coordinator's time that goes to metrics.

    python -m benchmarks.metrics [--quick]

A real local Ray with two replicas of a small model, whose steps are as short as steps get; every call that the
coordinator makes for the sake of metrics is timed, and Prometheus's part is timed by making the answer to a scrape.
Large runs are an exporter that was told of as many replicas.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
from prometheus_client import generate_latest

from actors.coordinator import Coordinator
from actors.exporter import Exporter
from benchmarks.cluster import DIRECTIONS, make_inputs
from benchmarks.common import Row, write_section
from zoray.config import RunConfig
from zoray.protocol import State, initial_state
from zoray.protocol.machines import Policy, Slot, SlotPhase
from zoray.protocol.membership import initial_membership
from zoray.protocol.state import Member, Settings
from zoray.runs import RunFolder

SCRAPES = 15.0
"""Seconds between two scrapes, as k8s/monitoring has it."""


class Stopwatch:
    """Sums the time of some methods of an object, the outermost call counting."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False

    def on(self, owner: Any, *names: str) -> None:
        """Time these methods from now on."""
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keys: Any) -> Any:
            if self._inside:
                return method(*arguments, **keys)
            self._inside, began = True, time.perf_counter()
            try:
                return method(*arguments, **keys)
            finally:
                self.seconds += time.perf_counter() - began
                self._inside = False

        return call


def coordinator_time(folder: Path, steps: int) -> list[Row]:
    """The share of a step that goes to metrics, with a scrape every ten steps."""
    inputs = make_inputs(folder, large=False)
    keys = {"directions": DIRECTIONS, "per_direction_batch_size": 2, "replicas": 2, "max_steps": steps}
    config = RunConfig.model_validate({**inputs, **keys})
    run = RunFolder.create(config, "metrics")
    coordinator = Coordinator(config, str(run.path))
    coordinator.prepare(False)
    watch, each, report = Stopwatch(), list[float](), coordinator.journal.report
    watch.on(coordinator.exporter, "beat", "exchanged", "committed", "evaluated", "changed", "weighed", "scraped")
    watch.on(coordinator.roster, "weigh")
    pages = []

    def reported(record: Any) -> None:
        report(record)
        each.append(watch.seconds)
        if record.step % 10 == 0:
            pages.append(scrape(coordinator.exporter))

    coordinator.journal.report = reported  # type: ignore[method-assign]
    coordinator.run()
    rows = list(run.rows("steps"))[5:]
    # A step's own share: from one report to the next.
    own = [after - before for before, after in pairwise(each[4:])][: len(rows)]
    step, spent = statistics.median(row["seconds"] for row in rows), statistics.median(own)
    making = statistics.median(seconds for _, seconds in pages)
    share = spent / step + making / SCRAPES
    return [
        Row(f"coordinator's time for metrics per step of {DIRECTIONS} probes, 2 replicas of a small model (median)",
            f"{spent * 1e6:.0f} µs of {step * 1e3:.1f} ms, and {making * 1e3:.1f} ms a scrape; {share:.2%} of a step",
            "≤ 1 %", share <= 0.01),
        Row("size of a scrape, 2 replicas", sizes(pages[-1][0]), "reported", None),
    ]  # fmt: skip


def scrape(exporter: Exporter) -> tuple[bytes, float]:
    """What a scrape gets, and the processor's seconds that it takes."""
    began = time.thread_time()
    page = generate_latest(exporter.registry)
    return page, time.thread_time() - began


def sizes(page: bytes) -> str:
    """A page's size, plain and as it is sent."""
    return f"{len(page) / 1024:.1f} KiB ({len(gzip.compress(page)) / 1024:.1f} KiB compressed)"


def large_run(replicas: int) -> list[Row]:
    """A scrape of a run of many replicas, each with its lag and its memory."""
    names = [f"r{i}" for i in range(replicas)]
    settings = Settings(max_steps=10_000, directions=4 * replicas, learning_rate=lambda step: 1e-6)
    state: State = replace(initial_state(settings, 1000, bytes(32)), members={n: Member(held=999) for n in names})
    members = initial_membership(Policy(1, None), replicas)
    exporter = Exporter("a-run-with-a-name-1a2b", "facebook/opt-1.3b", 10_000)
    exporter.beat(replace(members, slots={n: Slot("node", SlotPhase.ACTIVE, 0.0) for n in names}), state)
    for name in names:
        exporter.weighed(name, {"resident": 5_000_000_000, "peak": 5_000_000_000, "reserved": 5_000_000_000})
    pages = [scrape(exporter) for _ in range(20)]
    seconds = statistics.median(seconds for _, seconds in pages)
    return [
        Row(f"size of a scrape, {replicas} replicas", f"{sizes(pages[-1][0])}, {seconds * 1e3:.1f} ms to make",
            "reported", None),
    ]  # fmt: skip


def main() -> None:
    """Measure and write the section `metrics` of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps, for trying the script out")
    quick = parser.parse_args().quick
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        rows = coordinator_time(Path(folder), 30 if quick else 200)
    ray.shutdown()
    rows += large_run(64) + large_run(256)
    write_section("metrics", "Being watched", "python -m benchmarks.metrics", rows)


if __name__ == "__main__":
    main()
