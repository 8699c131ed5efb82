"""Raylets come, are killed and drain while a run goes on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.helpers import Machines, Result, Workplace

pytestmark = pytest.mark.timeout(900)


def by_node(status: dict[str, Any]) -> dict[str, str]:
    return {replica["node"]: replica["name"] for replica in status["replicas"]}


def test_machines_are_used_lost_and_left(machines: Machines, workplace: Workplace, undisturbed: Result) -> None:
    (first,) = machines.have(1)
    workplace.slow_from(10)
    run = workplace.start("train", "elastic", "replicas={min: 1, max: 3}")
    run.reaches(10)
    second = machines.add()
    beyond = workplace.refused(2, "scale", "elastic", "4")
    assert "4 is above the largest number of replicas" in beyond and "ask for 1 to 3" in beyond
    run.joins(2)
    status = workplace.status("elastic")
    names = by_node(status)
    assert names.keys() == {first, second}
    assert (status["state"], status["target"], machines.demand()) == ("running", 3, 3)

    machines.kill(first)
    before = run.steps()
    third = machines.add()
    run.joins(3)
    run.logs(f"replica {names[first]} is lost")
    assert run.steps() > before

    machines.drain(second)
    run.logs(f"replica {names[second]} leaves: it was asked to leave")
    assert f"machine {second} is about to be taken away: {names[second]} must leave it" in run.log
    # The draining machine has room, and three replicas are wanted: the run has looked at it again and again since.
    run.reaches(run.steps() + 3)
    assert by_node(workplace.status("elastic")).keys() == {third}

    workplace.full_speed()
    run.ends_as(undisturbed)
    assert machines.demand() == 0


def test_groups_are_packed_on_machines_and_go_with_them(
    machines: Machines, workplace: Workplace, undisturbed: Result
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (the extra zero3)")
    memory = "memory={kind: zero3, shards: 2}"
    machines.have(0)
    machines.add(), machines.add()
    alone = workplace.start("train", "apart", memory, "start_timeout=1")
    assert alone.ends() == 7, alone.text
    assert "A replica needs 2 CPU" in alone.text and "1 CPU; 1 CPU" in alone.text

    first = machines.add(2)
    workplace.slow_from(10)
    run = workplace.start("train", "packed", "replicas={min: 1, max: 3}", memory)
    run.reaches(10)
    (group,) = workplace.status("packed")["replicas"]
    assert group["node"] == first and len(set(group["pids"])) == 2 and machines.demand() == 3
    second = machines.add(2)
    run.joins(2)
    machines.kill(first)
    run.logs(f"replica {group['name']} is lost")
    run.reaches(run.steps() + 3)
    assert by_node(workplace.status("packed")).keys() == {second}
    workplace.full_speed()
    run.ends_as(undisturbed)
    machines.have(0)


def test_accelerators_that_no_machine_has(machines: Machines, workplace: Workplace) -> None:
    machines.have(1)
    run = workplace.start("train", "gpu", "gpus_per_replica=1", "start_timeout=1")
    assert run.ends() == 7, run.text
    assert "A replica needs 1 CPU and 1 GPU" in run.text and "1 CPU, 0 GPU" in run.text
    assert "Traceback" not in run.text and not run.folder.path.exists()
