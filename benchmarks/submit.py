"""How long a run that is submitted from a laptop takes to its first committed step.

    python -m benchmarks.submit [--quick]

A warm local Ray with its job server, a small model, and `zoray submit` as a process of its own; in turn the same run
by `zoray train` on the same Ray, which is what the way over HTTP and its checks are compared with.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray
import yaml

from benchmarks.cluster import make_inputs
from benchmarks.common import Row, write_section
from zoray.runs import RunFolder

ZORAY = [sys.executable, "-m", "launch.cli"]


def first_step(words: list[str], env: dict[str, str], folder: RunFolder) -> tuple[float, float, float]:
    """Start a command; seconds until it says `run NAME`, until its run has committed a step, and until it has ended."""
    started = time.perf_counter()
    command = subprocess.Popen(words, env=env, cwd=folder.path.parent.parent, stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    named = 0.0
    for line in command.stdout:
        if line.startswith("run "):
            named = time.perf_counter() - started
            break
    while next(iter(folder.rows("steps")), None) is None:
        assert command.poll() in (None, 0), f"{words} failed"
        time.sleep(0.005)
    committed = time.perf_counter() - started
    command.stdout.read()
    assert command.wait() == 0, f"{words} failed"
    return named, committed, time.perf_counter() - started


def until_over(folder: RunFolder) -> None:
    """Wait for the end of a run, so that the next one has the machine for itself."""
    while folder.read_state().get("state") in (None, "starting", "running"):
        time.sleep(0.05)
    time.sleep(2.0)


def main() -> None:
    """Run everything and write the section `submit` of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one pair, for trying the script out")
    pairs = 1 if parser.parse_args().quick else 5
    # What runs on the cluster finds `zoray` there, and the same code as here.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with tempfile.TemporaryDirectory(prefix="zoray-") as made:
        # Its jobs find their Ray by the address it leaves in its own folder.
        os.environ["RAY_TMPDIR"] = made
        context = ray.init(num_cpus=2, include_dashboard=True, log_to_driver=False, logging_level="ERROR")
        inputs = {**make_inputs(Path(made), large=False), "replicas": 1, "max_steps": 3}
        config = Path(made) / "bench.yaml"
        config.write_text(yaml.safe_dump(inputs))
        ways = {
            "submit": (["submit", str(config), "--address", f"http://{context.dashboard_url}"], dict(os.environ)),
            "train": (["train", str(config)], {**os.environ, "RAY_ADDRESS": context.address_info["gcs_address"]}),
        }
        times: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
        for pair in range(pairs + 1):
            for way, (words, env) in ways.items():
                folder = RunFolder(Path(made) / "runs" / f"{way}-{pair}")
                measured = first_step([*ZORAY, *words, f"run_name={folder.name}"], env, folder)
                until_over(folder)
                if pair:  # the first of each warms the machine up
                    times[way].append(measured)
        ray.shutdown()
    names, commits, _ = zip(*times["submit"], strict=True)
    _, trained, _ = zip(*times["train"], strict=True)
    more = [submitted - local for submitted, local in zip(commits, trained, strict=True)]
    rows = [
        Row("`zoray submit` to the first committed step, warm local cluster, small model", spread(commits), "reported",
            None),
        Row("of which until the run's name is printed", spread(names), "reported", None),
        Row("`zoray train` on the same cluster to the first committed step", spread(trained), "reported", None),
        Row("what the way over HTTP and its checks add (pair by pair)", spread(more), "reported", None),
    ]  # fmt: skip
    write_section("submit", "From a laptop", "python -m benchmarks.submit", rows)


def spread(values: list[float] | tuple[float, ...]) -> str:
    """Median, smallest and largest, in seconds."""
    return f"{statistics.median(values):.1f} s ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
