"""What joining costs, what a kill costs the others, and how many probes a second a coordinator can hand out.

    python -m benchmarks.elastic [--quick]

A real local Ray. The joiner is OPT-125M-shaped and 10,000 commits of 16 directions behind; the kill is among four
replicas of a small model; the coordinator alone is measured with replicas that answer at once, many to a process.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.coordinator import Coordinator
from actors.replica import ReplicaActor
from actors.settings import settings
from benchmarks.cluster import make_inputs
from benchmarks.common import Row, write_section
from benchmarks.simulated import SimulatedFleet
from zoray.commits import seal
from zoray.config import RunConfig
from zoray.identity import header_digest
from zoray.ledger import Ledger
from zoray.protocol import Item, Kind, encode_request
from zoray.runs import RunFolder
from zoray.snapshot import found, sweep, usable

BEHIND, DIRECTIONS, TIMED = 10_000, 16, 16


def write_ledger(folder: Path, header: dict[str, Any], stop: int, moving: int) -> Ledger:
    """A ledger of `stop` commits of random coefficients; only those from `moving` on change any weight."""
    random = np.random.default_rng(0)
    ledger = Ledger.create(folder, header)
    for step in range(stop):
        terms = tuple((step, k, int(c)) for k, c in enumerate(random.integers(-127, 128, DIRECTIONS)))
        ledger.append(seal(step, float(np.float32(1e-12)) if step >= moving else 0.0, 1.0, 1.0, terms, ledger.head))
    return ledger


def farthest(run: RunFolder, config: RunConfig, replica: Any, header: dict[str, Any]) -> int:
    """So many commits the policy of snapshots lets the last one be back, by the times of this machine.

    `replica` holds the base model, and a snapshot of other commits afterwards.
    """
    with write_ledger(run.path / "timed", header, 2 * TIMED, 0) as ledger:
        ray.get(replica.join.remote(ledger.genesis, header_digest(ledger.header), {}))
        ray.get(replica.catch_up.remote(ledger.records(0, TIMED)))
        began = time.perf_counter()
        ray.get(replica.catch_up.remote(ledger.records(TIMED, 2 * TIMED)))
        each = (time.perf_counter() - began) / TIMED
        began = time.perf_counter()
        ray.get(replica.work.remote(encode_request(Item(Kind.SNAPSHOT, 2 * TIMED))))
        saving = time.perf_counter() - began
    sweep(run.snapshots, after=0)
    return math.ceil(max(settings(config, 0).snapshot_after or 0.0, 2 * saving) / each)


def joining(folder: Path) -> list[Row]:
    """A new replica of OPT-125M, 10,000 commits behind, the last snapshot as far back as the policy lets it be."""
    inputs = make_inputs(folder, large=True)
    config = RunConfig.model_validate({**inputs, "directions": DIRECTIONS, "per_direction_batch_size": 8,
                                       "max_steps": 2 * BEHIND, "threads_per_replica": 2})  # fmt: skip
    run = RunFolder.create(config, "join")
    remote: Any = ray.remote(ReplicaActor)

    def start() -> tuple[Any, Any, float]:
        began = time.perf_counter()
        actor = remote.options(num_cpus=0).remote("r0", config, str(run.snapshots))
        return actor, ray.get(actor.introduce.remote()), time.perf_counter() - began

    first, introduction, _ = start()
    unsaved = farthest(run, config, first, dict(introduction.header))
    ray.kill(first)
    saved = BEHIND - unsaved
    ledger = write_ledger(run.ledger, dict(introduction.header), BEHIND, saved)
    digest = header_digest(ledger.header)
    first, _, _ = start()
    # The commits up to the snapshot change nothing, so the weights there are those of the base model.
    ray.get(first.join.remote(ledger.genesis, digest, {}))
    ray.get(first.catch_up.remote(ledger.records(0, saved)))
    ray.get(first.work.remote(encode_request(Item(Kind.SNAPSHOT, saved))))
    ray.kill(first)
    actor, _, loading = start()
    began = time.perf_counter()
    ray.get(actor.join.remote(ledger.genesis, digest, usable(found(run.snapshots), ledger)))
    records = ledger.records(saved, BEHIND)
    ray.get(actor.catch_up.remote(records))
    replayed = time.perf_counter() - began
    ray.get(actor.work.remote(encode_request(Item(Kind.DIGEST, BEHIND))))
    proved = time.perf_counter() - began
    ray.kill(actor)
    everything = len(ledger.records(0, BEHIND))
    return [
        Row(f"new replica, OPT-125M, {BEHIND:,} commits behind, snapshot {unsaved} back: beyond loading the model",
            f"{proved:.1f} s ({replayed:.1f} s snapshot and replay, {proved - replayed:.1f} s digest)", "≤ 10 s",
            proved <= 10),
        Row("of which loading the model, imports and proofs included, come before", f"{loading:.1f} s", "", None),
        Row("the same without any snapshot, from the time of a commit above",
            f"{replayed / unsaved * BEHIND:,.0f} s", "reported", None),
        Row(f"bytes a joiner receives without any snapshot, {BEHIND:,} steps of {DIRECTIONS} directions",
            f"{everything / 2**20:.3f} MiB", "≤ 1 MiB", everything <= 2**20),
        Row("the same with the snapshot", f"{len(records) / 2**10:.1f} KiB", "reported", None),
    ]  # fmt: skip


def kill_one(folder: Path, kills: int) -> list[Row]:
    """The longest step after a kill -9 of one of four replicas, against the usual step."""
    inputs = make_inputs(folder, large=False)
    keys = {"directions": DIRECTIONS, "per_direction_batch_size": 64, "replicas": 4, "max_steps": 10**6}
    config = RunConfig.model_validate({**inputs, **keys})
    run = RunFolder.create(config, "kill")
    coordinator = Coordinator(config, str(run.path), embedded=True)
    coordinator.prepare(False)
    report, killed = coordinator.journal.report, list[int]()

    def act(record: Any) -> None:
        report(record)
        members = coordinator.state.members if coordinator.state is not None else {}
        if record.step < 20 or len(members) < 4 or (killed and record.step < killed[-1] + 20):
            return
        if len(killed) == kills:
            coordinator.stop()
            return
        name = next(name for name, member in members.items() if member.item is not None)
        os.kill(coordinator.roster.admission.introductions[name].pid, signal.SIGKILL)
        killed.append(record.step)

    coordinator.journal.report = act  # type: ignore[method-assign]
    coordinator.run()
    rows = list(run.rows("steps"))
    usual = statistics.median(row["seconds"] for row in rows)
    probe = statistics.median(row["probe_seconds"] * row["replicas"] / DIRECTIONS for row in rows)
    pauses = [max(row["seconds"] for row in rows[step + 1 : step + 6]) - usual for step in killed]
    limit = probe + 1.0
    return [
        Row(f"longest step after one of 4 replicas is killed, beyond the usual step, {len(killed)} kills",
            f"{statistics.median(pauses):.2f} s ({min(pauses):.2f} to {max(pauses):.2f}); step {usual:.2f} s, "
            f"probe {probe:.2f} s", f"≤ a probe + 1 s = {limit:.2f} s", statistics.median(pauses) <= limit),
    ]  # fmt: skip


def coordinator_alone(folder: Path, replicas: int, steps: int) -> list[Row]:
    """Probes a second through Ray, with simulated replicas that answer at once."""
    inputs = make_inputs(folder, large=False)
    keys = {"directions": 4 * replicas, "replicas": replicas, "max_steps": steps, "learning_rate": 1e-9}
    config = RunConfig.model_validate({**inputs, **keys})
    run = RunFolder.create(config, "alone")
    coordinator = Coordinator(config, str(run.path), embedded=True)
    fleet = SimulatedFleet(config, run.snapshots, processes=2)
    coordinator.roster.fleet = coordinator.roster.admission._fleet = fleet
    coordinator.prepare(False)
    joined = coordinator.roster.members
    coordinator.run()
    rows = list(run.rows("steps"))[2:]
    rate = 4 * replicas / statistics.median(row["seconds"] for row in rows)
    return [
        Row(f"probes a second handed out to {len(joined.slots)} simulated replicas of 0 s, in 2 processes, through Ray",
            f"{rate:,.0f}", "≥ 1,000", rate >= 1000),
    ]  # fmt: skip


def main() -> None:
    """Measure and write the section `elastic` of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer kills and steps, for trying the script out")
    parser.add_argument("--only", choices=("joining", "kill", "coordinator"), help="one part, printed and not recorded")
    asked = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    parts: dict[str, Callable[[Path], list[Row]]] = {
        "joining": joining,
        "kill": lambda folder: kill_one(folder, 2 if asked.quick else 5),
        "coordinator": lambda folder: coordinator_alone(folder, 256, 5 if asked.quick else 12),
    }
    rows = []
    for name, part in parts.items():
        if asked.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                rows += part(Path(folder))
    ray.shutdown()
    if asked.only:
        print(*rows, sep="\n")
    else:
        write_section("elastic", "Joining, dying, and a coordinator alone", "python -m benchmarks.elastic", rows)


if __name__ == "__main__":
    main()
