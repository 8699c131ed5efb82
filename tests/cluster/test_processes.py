"""More replicas wanted than there is room for; then the processes on which all hangs are killed with kill -9.

What is left of a run ends by itself, and resume ends as undisturbed.
"""

from __future__ import annotations

import json
import os
import signal

import pytest

from actors.lock import held_by
from tests.cluster.helpers import Machines, Result, Workplace, gone, until
from zoray.ledger import Ledger
from zoray.runs import RunFolder

pytestmark = pytest.mark.timeout(900)


def committed(folder: RunFolder) -> int:
    with Ledger.open(folder.ledger, repair=False) as ledger:
        return ledger.next_step


def test_the_coordinator_and_the_driver_are_killed(
    machines: Machines, workplace: Workplace, undisturbed: Result
) -> None:
    machines.have(2)
    workplace.slow_from(10)
    run = workplace.start("train", "mortal", "replicas=4")
    run.reaches(10)
    run.joins(2)
    assert "2 active; 4 wanted (at least 1)" in workplace.zoray("status", "mortal").stdout
    machines.add()
    assert "in progress: mortal" in workplace.refused(6, "stop", "nope")
    run.joins(3)
    watcher = workplace.start("watch", "mortal")
    until(lambda: "/200" in watcher.text, "the first line of the one who watches")
    # Less than there is: one of the three leaves.
    assert workplace.api("mortal", "print(run.scale(2).target)") == "4\n"
    run.logs("leaves: it was asked to leave")
    until(lambda: machines.demand() == 2, "the announcement of two replicas")

    (row,) = json.loads(workplace.zoray("list", "--json").stdout)
    assert (row["run"], row["state"], row["target"]) == ("mortal", "running", 2)
    replicas = [replica["pid"] for replica in row["replicas"]]
    assert len(replicas) == 2 and not any(map(gone, replicas))
    os.kill(run.folder.read_state()["pid"], signal.SIGKILL)
    assert run.ends() == 7, run.text
    assert "coordinator of mortal died" in run.text and "continue with `zoray resume mortal`" in run.text
    assert "Traceback" not in run.text
    assert watcher.ends() == 6, watcher.text
    for words in ("2 replicas wanted, instead of 4", "is gone, it was", "died after step", "`zoray resume mortal`"):
        assert words in watcher.text
    assert "Traceback" not in watcher.text
    until(lambda: all(map(gone, replicas)), "the end of the replicas")
    step = committed(run.folder)
    told = workplace.status("mortal")
    # The last commit may have been made durable an instant before it could be recorded.
    assert told["state"] == "lost" and step - 1 <= told["step"] <= step
    assert f"`zoray resume mortal` continues with step {told['step']}" in workplace.zoray("status", "mortal").stdout
    assert "zoray resume mortal" in workplace.refused(6, "scale", "mortal", "2")

    run = workplace.start("resume", "mortal", "replicas=1")
    run.reaches(step + 2)
    coordinator = run.folder.read_state()["pid"]
    (replica,) = workplace.status("mortal")["replicas"]
    run.kill()
    until(lambda: gone(coordinator) and gone(replica["pid"]), "the end of the coordinator and its replica")
    until(lambda: held_by(run.folder.path) is None, "the end of its lock")
    assert committed(run.folder) >= step + 2

    workplace.full_speed()
    run = workplace.start("resume", "mortal", "replicas=1")
    run.ends_as(undisturbed)
    assert f"resumed at step {step}" in run.log
    assert machines.demand() == 0
