"""Sharded replicas on accelerators (`make gpu`), placed there by a real Ray, one device a process."""

from __future__ import annotations

import os
import signal
from typing import Any

import psutil
import pytest
import torch

from tests.integration.conftest import Inputs, Launch, Ran
from tests.integration.test_elastic import LONG, check_whole, when
from tests.integration.test_sharded import pids

COUNT = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(COUNT == 0, reason="there is no accelerator on this machine"),
]
two_devices = pytest.mark.skipif(COUNT < 2, reason=f"NCCL wants a device per process: two, and here are {COUNT}")
keys: dict[str, Any] = {"replicas": 1, "gpus_per_replica": 1, **LONG}


@pytest.fixture
def resident(inputs: Inputs, launch: Launch) -> Ran:
    """One replica with a device, nothing happens."""
    return launch(inputs.config(**keys))


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_one_process_with_parts_makes_the_run_of_a_resident_one(
    offload: str, resident: Ran, inputs: Inputs, launch: Launch
) -> None:
    check_whole(launch(inputs.config(memory={"kind": "zero3", "shards": 1, "offload": offload}, **keys)), resident)


@two_devices
def test_a_group_that_loses_a_process_ends_and_the_run_goes_on(resident: Ran, inputs: Inputs, launch: Launch) -> None:
    """Under NCCL the other process would wait for ever: nothing but the coordinator ends it."""
    seen: dict[str, tuple[int, ...]] = {}

    def break_group(coordinator: Any) -> None:
        seen["pids"] = pids(coordinator, "r0")
        os.kill(seen["pids"][1], signal.SIGKILL)

    def look(coordinator: Any) -> None:
        seen["left"] = tuple(pid for pid in seen["pids"] if psutil.pid_exists(pid))

    config = inputs.config(memory={"kind": "zero3", "shards": 2}, **keys)
    ran = launch(config, at=when({12: break_group, 14: look}))
    check_whole(ran, resident)
    assert len(set(seen["pids"])) == 2 and seen["left"] == ()
    assert ran.coordinator.state.counters.lost == 1
