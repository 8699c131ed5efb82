"""Kill replicas and coordinators of one run for a long time, and compare what comes out with an undisturbed run.

    python -m benchmarks.soak [--minutes 30] [--every 5] [--seed 0]

Four one-thread replicas on a local Ray. Every few seconds (exponentially distributed) one process of the run gets
kill -9: mostly a replica, now and then the coordinator, whose run is resumed at once. When the time is over, the run is
stopped. Then the same configuration runs for the same number of steps with nobody disturbing it, and the ledgers are
compared commit by commit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray

from actors.inbox import receive
from benchmarks.cluster import make_inputs
from benchmarks.common import Row, write_section
from launch.cluster import NAMESPACE, Place
from launch.train import start_coordinator
from zoray.config import RunConfig
from zoray.errors import ZorayError
from zoray.ledger import Ledger
from zoray.runs import RunFolder

REPLICAS = 4
ENDLESS = 10**9
PLACE = Place("the Ray of the soak", embedded=True)


@dataclass
class Tally:
    """What happened."""

    replicas: int = 0
    coordinators: int = 0
    lost: int = 0
    given_up: int = 0
    acknowledged: int = 0
    lives: list[float] = field(default_factory=list)


def begin(folder: RunFolder, config: RunConfig, resume: bool) -> Any:
    """A coordinator that is running, waited for until its replicas are ready."""
    while True:
        coordinator = None
        try:
            coordinator = start_coordinator(folder, config, PLACE)
            receive(coordinator.prepare.remote(resume), "the coordinator")
            coordinator.run.remote()
            return coordinator
        except ZorayError as error:
            # Ray may not have noticed yet that the one before is dead.
            print(f"again: {error.what}", flush=True)
            if coordinator is not None:
                ray.kill(coordinator)
            time.sleep(1.0)


def disturb(folder: RunFolder, config: RunConfig, minutes: float, every: float, seed: int) -> Tally:
    """The run with kills in it."""
    rng, tally = random.Random(seed), Tally()
    coordinator = begin(folder, config, resume=False)
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        time.sleep(min(rng.expovariate(1 / every), 6 * every))
        try:
            status = receive(coordinator.status.remote(), "the coordinator")
        except ZorayError as error:
            print(f"the coordinator is gone: {error.what}", flush=True)
            coordinator = begin(folder, config, resume=True)
            continue
        if status.progress.step < tally.acknowledged:
            tally.lost += tally.acknowledged - status.progress.step
        tally.acknowledged = max(tally.acknowledged, status.progress.step)
        if status.state != "running":
            # Replicas were killed faster than they could be started: it gave up, with advice to resume.
            tally.given_up += 1
            ray.kill(coordinator)
            coordinator = begin(folder, config, resume=True)
            continue
        if rng.random() < 0.1:
            os.kill(folder.read_state()["pid"], signal.SIGKILL)
            tally.coordinators += 1
            coordinator = begin(folder, config, resume=True)
            step = receive(coordinator.progress.remote(), "the coordinator").step
            tally.lost += max(0, tally.acknowledged - step)
            continue
        victims = [replica.pid for replica in status.replicas if replica.pid is not None]
        if victims:
            try:
                os.kill(rng.choice(victims), signal.SIGKILL)
                tally.replicas += 1
            except ProcessLookupError:
                pass
    stop(coordinator)
    return tally


def stop(coordinator: Any) -> None:
    """End a run at its step boundary, and its process."""
    receive(coordinator.stop.remote(), "the coordinator")
    while not receive(coordinator.progress.remote(), "the coordinator").finished:
        time.sleep(0.2)
    ray.kill(coordinator)


def undisturbed(inputs: dict[str, object], steps: int, folder: Path) -> RunFolder:
    """The same configuration with two replicas and nobody to disturb it."""
    config = RunConfig.model_validate({**inputs, "max_steps": steps, "replicas": 2, "output_dir": str(folder)})
    run = RunFolder.create(config, "undisturbed")
    coordinator = start_coordinator(run, config, PLACE)
    receive(coordinator.prepare.remote(False), "the coordinator")
    receive(coordinator.run.remote(), "the coordinator")
    ray.kill(coordinator)
    return run


def main() -> None:
    """Soak, compare, and write the section `soak` of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=5.0, help="mean seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="an empty folder for the runs, which is not deleted")
    asked = parser.parse_args()
    ray.init(namespace=NAMESPACE, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as somewhere:
        place = asked.keep or somewhere
        inputs = {**make_inputs(Path(place), large=False), "directions": 16, "per_direction_batch_size": 64}
        config = RunConfig.model_validate({**inputs, "max_steps": ENDLESS, "replicas": REPLICAS})
        folder = RunFolder.create(config, "soak")
        tally = disturb(folder, config, asked.minutes, asked.every, asked.seed)
        rows = list(folder.rows("steps"))
        with Ledger.open(folder.ledger, repair=False) as ledger:
            steps = ledger.next_step
        print(f"{steps} steps, {tally}", flush=True)
        calm = undisturbed(inputs, steps, Path(place) / "calm")
        with Ledger.open(folder.ledger, repair=False) as one, Ledger.open(calm.ledger, repair=False) as other:
            equal = [c.hash for c in one.commits()] == [c.hash for c in other.commits()]
        digests = [{row["step"]: row["digest"] for row in f.rows("digests")}.get(steps) for f in (folder, calm)]
        pauses = [b["time"] - a["time"] for a, b in pairwise(rows)]
        usual = sorted(pauses)[len(pauses) // 2]
    ray.shutdown()
    kills = tally.replicas + tally.coordinators
    write_section("soak", "Kills", "python -m benchmarks.soak", [
        Row("minutes, mean seconds between two kills", f"{asked.minutes:g}, {asked.every:g}", "≥ 30, a few",
            asked.minutes >= 30),
        Row("kill -9 survived", f"{kills}: {tally.replicas} replicas, {tally.coordinators} coordinators", "all", True),
        Row("times the run gave up, since replicas died faster than they start, and was resumed", f"{tally.given_up}",
            "reported", None),
        Row("committed steps lost", f"{tally.lost} of {steps}", "0", tally.lost == 0),
        Row("longest pause between two commits; the usual one", f"{max(pauses):.1f} s; {usual * 1e3:.0f} ms",
            "reported", None),
        Row("every commit equals that of an undisturbed run of two replicas", "yes" if equal else "no", "yes", equal),
        Row("digest of the weights at the end", " = ".join(str(d) for d in digests), "equal",
            digests[0] is not None and digests[0] == digests[1]),
    ])  # fmt: skip
    if not equal or tally.lost:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
