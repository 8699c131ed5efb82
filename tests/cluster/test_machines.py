"""Raylets come, are killed and drain while a run goes on."""

from __future__ import annotations

from tests.cluster.helpers import Machines, Result, Workplace


def test_machines_are_used_lost_and_left(machines: Machines, workplace: Workplace, undisturbed: Result) -> None:
    (first,) = machines.have(1)
    workplace.slow_from(10)
    run = workplace.start("train", "elastic", "replicas={min: 1, max: 3}")
    run.reaches(10)
    second = machines.add()
    beyond = workplace.refused(2, "scale", "elastic", "4")
    assert "4 is above the largest number of replicas" in beyond and "ask for 1 to 3" in beyond
    run.joined("r1")
    status = workplace.status("elastic")
    assert {replica["name"]: replica["node"] for replica in status["replicas"]} == {"r0": first, "r1": second}
    assert (status["state"], status["target"], machines.demand()) == ("running", 3, 3)

    machines.kill(first)
    before = run.steps()
    third = machines.add()
    run.joined("r2")
    run.logs("replica r0 is lost")
    assert run.steps() > before

    machines.drain(second)
    run.logs("replica r1 leaves: it was asked to leave")
    assert f"machine {second} is about to be taken away: r1 must leave it" in run.log
    # The draining machine has room, and three replicas are wanted: the run has looked at it again and again since.
    run.reaches(run.steps() + 5)
    status = workplace.status("elastic")
    assert [(replica["name"], replica["node"]) for replica in status["replicas"]] == [("r2", third)]
    assert status["faults"]["lost"] == 1

    workplace.full_speed()
    run.ends_as(undisturbed)
    assert "replica r3" not in run.log
    assert machines.demand() == 0


def test_accelerators_that_no_machine_has(machines: Machines, workplace: Workplace) -> None:
    machines.have(1)
    run = workplace.start("train", "gpu", "gpus_per_replica=1", "start_timeout=1")
    assert run.ends() == 7, run.text
    assert "A replica needs 1 CPU and 1 GPU" in run.text and "1 CPU, 0 GPU" in run.text
    assert "Traceback" not in run.text and not run.folder.path.exists()
