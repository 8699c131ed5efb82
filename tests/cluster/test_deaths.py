"""kill -9 of the processes on which a run hangs; what is left ends by itself, and resume ends as undisturbed."""

from __future__ import annotations

import os
import signal

from actors.lock import held_by
from tests.cluster.helpers import Driver, Machines, Workplace, gone, until
from zoray.ledger import Ledger


def committed(run: Driver) -> int:
    with Ledger.open(run.folder.ledger, repair=False) as ledger:
        return ledger.next_step


def test_the_coordinator_and_the_driver_are_killed(
    machines: Machines, workplace: Workplace, undisturbed: Driver
) -> None:
    machines.have(2)
    workplace.slow_from(20)
    run = workplace.start("train", "mortal", "replicas=2")
    run.reaches(20)
    replicas = [replica["pid"] for replica in workplace.status("mortal")["replicas"]]
    assert len(replicas) == 2 and not any(map(gone, replicas))

    os.kill(run.folder.read_state()["pid"], signal.SIGKILL)
    assert run.ends() == 7, run.text
    assert "coordinator of mortal died" in run.text and "continue with `zoray resume mortal`" in run.text
    assert "Traceback" not in run.text
    until(lambda: all(map(gone, replicas)), "the end of the replicas")
    step = committed(run)
    told = workplace.status("mortal")
    # The last commit may have been made durable an instant before it could be recorded.
    assert told["state"] == "lost" and step - 1 <= told["step"] <= step
    assert f"`zoray resume mortal` continues with step {told['step']}" in workplace.zoray("status", "mortal").stdout
    assert "zoray resume mortal" in workplace.refused(6, "scale", "mortal", "2")

    run = workplace.start("resume", "mortal", "replicas=1")
    run.reaches(step + 2)
    coordinator = run.folder.read_state()["pid"]
    replicas = [replica["pid"] for replica in workplace.status("mortal")["replicas"]]
    run.kill()
    until(lambda: all(map(gone, [coordinator, *replicas])), "the end of the coordinator and its replica")
    assert held_by(run.folder.path) is None
    assert committed(run) >= step + 2

    workplace.full_speed()
    run = workplace.start("resume", "mortal", "replicas=1")
    run.ends_as(undisturbed)
    assert f"resumed at step {step}" in run.log
