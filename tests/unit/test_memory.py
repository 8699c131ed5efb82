"""What every memory must do (see `shards.py`), in worlds of real processes; resident and streamed in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_model
from tests.unit import shards
from tests.unit.test_architectures import MODELS
from zoray.replica import Replica
from zoray.snapshot import load_newest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (the extra zero3)")
pytest.importorskip("accelerate", reason="accelerate is not installed (the extra zero3)")

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).resolve().parents[2]


def make_models(folder: Path) -> None:
    for kind in ("gpt2", "opt", "llama", "mixtral"):
        make_model(kind, folder)
    make_model("gpt2", folder / "made", n_layer=6, n_embd=64, n_head=2, vocab_size=200)
    (folder / "made" / "gpt2").rename(folder / "deep")
    make_model("gpt2", folder / "made", n_layer=1, n_embd=512, n_head=2)
    (folder / "made" / "gpt2").rename(folder / "large")
    for kind in ("mamba", "mpnet"):
        torch.manual_seed(0)
        MODELS[kind][0]().save_pretrained(folder / kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("worlds")
    make_models(made / "models")
    return made


@pytest.fixture(scope="module")
def reports(folder: Path) -> list[dict[str, Any]]:
    """What the processes report of all worlds; 40 s on two quiet cores, several times that beside other tests."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.unit.shards"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    logs = [folder / f"log-{rank}" for rank in range(max(size for _, size in shards.WORLDS))]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(500) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    told = [(folder / f"report-{rank}.jsonl").read_text().splitlines() for rank in range(len(logs))]
    for rank, code in enumerate(codes):
        last = told[rank][-1] if told[rank] else "nothing"
        assert code == 0, f"process {rank} ended with {code} after {last}:\n{logs[rank].read_text()[-6000:]}"
    return [json.loads(line) for lines in told for line in lines]


CASES = [(backend, size, check) for (backend, size), checks in shards.WORLDS.items() for check in checks]


@pytest.mark.parametrize(("backend", "size", "check"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_sharded(reports: list[dict[str, Any]], backend: str, size: int, check: shards.Check) -> None:
    found = [r for r in reports if (r["world"], r["check"]) == (f"{backend}-{size}", check.__name__)]
    faults = [report["fault"] for report in found if report["fault"]]
    assert not faults, "\n".join(faults)
    assert len(found) == size, "an earlier check of this world failed"
    if found[0]["skipped"]:
        pytest.skip(found[0]["skipped"])


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
