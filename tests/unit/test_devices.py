"""Sharded and streamed replicas on accelerators (`make gpu`): what `test_memory.py` checks on processors, and more."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit import shards
from tests.unit.test_world import GROUP
from tests.unit.worlds import cases, make_models, reason, run_worlds
from zoray.memory.world import Meeting

COUNT = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(COUNT == 0, reason="there is no accelerator on this machine"),
]
two_devices = pytest.mark.skipif(COUNT < 2, reason=f"NCCL wants a device per process: two, and here are {COUNT}")

PATIENCE = 20
"""Seconds that a process waits for another in a collective."""

SIZES = {"one-device": 1, "shared-device": 2, "two-devices": 2}


def alone_with(device: int) -> dict[str, str]:
    """The environment of a process that sees one device, as Ray makes it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(COUNT)))
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[device]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("worlds")
    make_models(made / "models", tall=True)
    return made


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Any]]]:
    """What the processes of each setting report, once it has been asked for."""
    return {}


def asked(found: dict[str, list[dict[str, Any]]], folder: Path, setting: str) -> list[dict[str, Any]]:
    if setting not in found:
        place = folder / setting
        place.mkdir()
        (place / "models").symlink_to(folder / "models")
        found[setting] = []
        devices = [rank if setting == "two-devices" else 0 for rank in range(SIZES[setting])]
        found[setting] = run_worlds(place, setting, [alone_with(device) for device in devices])
    return found[setting]


CASES = [
    pytest.param(setting, *case, marks=two_devices if setting == "two-devices" else ())
    for setting in SIZES
    for case in cases(setting)
]


@pytest.mark.parametrize(
    ("setting", "backend", "size", "check"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_sharded(
    found: dict[str, list[dict[str, Any]]], folder: Path, setting: str, backend: str, size: int, check: shards.Check
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (the extra zero3)")
    pytest.importorskip("accelerate", reason="accelerate is not installed (the extra zero3)")
    if why := reason(asked(found, folder, setting), backend, size, check):
        pytest.skip(why)


@pytest.mark.parametrize("check", (*shards.CONTRACT, shards.every_path), ids=lambda check: check.__name__)
@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_streamed(folder: Path, offload: str, check: shards.Check) -> None:
    check(shards.World(f"streamed-{offload}", 0, 1, folder / "models", folder, "cuda"))


@two_devices
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "left-alone"])
def test_a_process_that_lost_its_peer_ends(ended: bool) -> None:
    """By whoever has started it, at once, whatever it waits for; and by itself when its patience is over."""
    meeting = Meeting("127.0.0.1")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", GROUP, meeting.place, str(rank), "nccl", str(PATIENCE)],
            env={**os.environ, **alone_with(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "8\n"
        processes[1].communicate()
        # It is in the collective by then.
        time.sleep(5)
        started = time.monotonic()
        if ended:
            assert processes[0].poll() is None
            processes[0].kill()
        processes[0].wait(PATIENCE + 120)
        assert not ended or time.monotonic() - started < 20
    finally:
        for process in processes:
            process.kill()
            process.wait()
