"""A run on a Ray of its own, seen and changed from other processes by someone who has set nothing of Ray's."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.helpers import Machines, Result, Workplace, until
from zoray.runs import RunFolder

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def left_behind() -> Iterator[str]:
    """A folder for Ray's files in which `ray start` has left the address of a cluster that is gone."""
    # Not below pytest's folder: the paths of Ray's sockets would be too long.
    with tempfile.TemporaryDirectory(prefix="zoray-") as folder:
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        yield folder


def test_control_of_a_run_on_an_embedded_ray(
    alone: Workplace, left_behind: str, machines: Machines, on_cluster: dict[str, str], undisturbed: Result
) -> None:
    alone.slow_from(10)
    run = alone.start("train", "single", "replicas=1", "report_to=tensorboard", RAY_TMPDIR=left_behind)
    run.reaches(10)
    coordinator = run.folder.read_state()["pid"]
    watchers = [alone.start("watch", "single") for _ in range(2)]
    for watcher in watchers:
        until(lambda watcher=watcher: "/200" in watcher.text, "the first line of one who watches")

    done = alone.zoray("scale", "single", "2")
    assert "2 replicas wanted, instead of 1; 1 at work" in done.stdout and not done.stderr
    # Bad targets, while the second replica starts.
    assert "cannot be scaled to 0 replicas" in alone.refused(2, "scale", "single", "0")
    assert "-1" in alone.refused(2, "scale", "single", "-1")
    assert "There cannot be -1 replicas" in alone.refused(2, "scale", "single", "--", "-1")
    for words in (("scale", "nope", "2"), ("stop", "nope"), ("status", "nope")):
        assert "give one of: single" in alone.refused(6, *words)
    assert f"process {coordinator} on" in alone.refused(6, "resume", "single")
    run.joins(2)

    status = alone.status("single")
    assert (status["state"], status["target"], status["minimum"], status["maximum"]) == ("running", 2, 1, None)
    assert [replica["state"] for replica in status["replicas"]] == ["active", "active"]
    assert all(replica["pid"] and replica["host"] and replica["lag"] is not None for replica in status["replicas"])
    assert status["faults"]["diverged"] == 0
    for watcher in watchers:
        until(lambda watcher=watcher: "r1 is active, it was starting" in watcher.text, "the second replica in view")
    os.killpg(watchers[0].process.pid, signal.SIGINT)
    assert watchers[0].ends() == 0 and "single goes on" in watchers[0].text
    assert "running" in alone.zoray("list").stdout

    assert "`zoray resume single` continues it" in alone.zoray("stop", "single").stdout
    assert run.ends() == 130 and "Traceback" not in run.text
    step = run.steps()
    # It sees the end, although Ray ends with the run.
    assert watchers[1].ends() == 0 and f"stopped at step {step}" in watchers[1].text
    assert "Traceback" not in watchers[1].text
    watched = alone.zoray("watch", "single")
    assert watched.returncode == 0 and f"stopped at step {step}" in watched.stdout
    assert f"stopped at step {step}" in alone.zoray("status", "single").stdout
    assert f"it has ended: stopped at step {step}" in alone.refused(6, "scale", "single", "2")
    assert "zoray resume single" in alone.refused(6, "stop", "single")

    # It goes on elsewhere.
    alone.full_speed()
    machines.have(1)
    run = alone.start("resume", "single", "replicas=1", **on_cluster, RAY_ADDRESS=machines.address)
    run.ends_as(undisturbed)
    assert f"continuing with step {step}" in run.text
    assert "all 200 steps are committed" in alone.refused(6, "stop", "single")
    (row,) = json.loads(alone.zoray("list", "--json").stdout)
    assert (row["name"], row["state"], row["step"]) == ("single", "done", 200)
    assert sorted(tracked(run.folder)) == sorted({*range(10, 201, 10), step})


def tracked(folder: RunFolder) -> list[int]:
    """Steps at which TensorBoard has a loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder.tensorboard), size_guidance={"scalars": 0}).Reload()
    return [event.step for event in found.Scalars("train/loss")]
