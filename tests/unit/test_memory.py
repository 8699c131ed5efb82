"""What every memory must do (see `shards.py`), in worlds of real processes; resident and streamed in this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit import shards
from tests.unit.worlds import cases, make_models, reason, run_worlds
from zoray.replica import Replica
from zoray.snapshot import load_newest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (the extra zero3)")
pytest.importorskip("accelerate", reason="accelerate is not installed (the extra zero3)")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("worlds")
    make_models(made / "models")
    return made


@pytest.fixture(scope="module")
def reports(folder: Path) -> list[dict[str, Any]]:
    """What the processes report of all worlds; 40 s on two quiet cores, several times that beside other tests."""
    return run_worlds(folder, "processors", [{}] * max(size for _, size in shards.WORLDS))


@pytest.mark.parametrize(
    ("backend", "size", "check"), cases("processors"), ids=lambda value: getattr(value, "__name__", str(value))
)
def test_sharded(reports: list[dict[str, Any]], backend: str, size: int, check: shards.Check) -> None:
    if why := reason(reports, backend, size, check):
        pytest.skip(why)


@pytest.mark.parametrize("check", shards.RESIDENT, ids=lambda check: check.__name__)
def test_resident(folder: Path, check: shards.Check) -> None:
    check(shards.World("resident", 0, 1, folder / "models", folder))


@pytest.mark.parametrize("check", shards.STREAMED, ids=lambda check: check.__name__)
@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_streamed(folder: Path, offload: str, check: shards.Check) -> None:
    check(shards.World(f"streamed-{offload}", 0, 1, folder / "models", folder))


@pytest.mark.usefixtures("reports")
@pytest.mark.parametrize("dtype", shards.DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_snapshots_of_processes_are_read_by_one(folder: Path, size: int, dtype: str) -> None:
    resident, reader = (Replica(shards.Odd(getattr(torch, dtype)), 7) for _ in range(2))
    resident.apply(shards.COMMITS)
    place = folder / f"own-zero3-{size}-{dtype}"
    files = sorted(path.name for path in (place / "step-3").glob("*.safetensors"))
    assert files == [f"part-{i}-of-{size}.safetensors" for i in range(size)] or (size == 1 and len(files) == 1)
    assert load_newest(place, reader, shards.RUN, {3: shards.HEAD}) == shards.HEAD
    assert reader.digest() == resident.digest()
