"""Starting the processes that `shards.py` runs in, and the models they load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.conftest import make_model
from tests.unit import shards
from tests.unit.test_architectures import MODELS
from zoray.memory.world import Meeting

ROOT = Path(__file__).resolve().parents[2]


def make_models(folder: Path, tall: bool = False) -> None:
    """Those of the checks; with `tall`, also one of 100 MB, for checks of an accelerator's memory."""
    for kind in ("gpt2", "opt", "llama", "mixtral"):
        make_model(kind, folder)
    made: dict[str, dict[str, int]] = {
        "deep": {"n_layer": 6, "n_embd": 64, "n_head": 2, "vocab_size": 200},
        "large": {"n_layer": 1, "n_embd": 512, "n_head": 2},
        **({"tall": {"n_layer": 8, "n_embd": 512, "n_head": 2}} if tall else {}),
    }
    for name, sizes in made.items():
        make_model("gpt2", folder / "made", **sizes)
        (folder / "made" / "gpt2").rename(folder / name)
    for kind in ("mamba", "mpnet"):
        torch.manual_seed(0)
        MODELS[kind][0]().save_pretrained(folder / kind)


def run_worlds(folder: Path, setting: str, environments: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """What the processes of a setting report of all its worlds.

    Args:
        folder: has the models, in `models`.
        environments: what each process's has besides.
    """
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.unit.shards"]
    path = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    common = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    meetings = {f"{backend}-{size}": Meeting("127.0.0.1") for backend, size in shards.SETTINGS[setting].worlds}
    (folder / "places.json").write_text(json.dumps({name: meeting.place for name, meeting in meetings.items()}))
    logs = [folder / f"log-{rank}" for rank in range(len(environments))]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder), setting],
            cwd=ROOT,
            env={**common, **environments[rank]},
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


def cases(setting: str) -> list[tuple[str, int, shards.Check]]:
    """The backend, the number of processes and the check of each of its tests."""
    worlds = shards.SETTINGS[setting].worlds
    return [(backend, size, check) for (backend, size), checks in worlds.items() for check in checks]


def reason(reports: Sequence[Mapping[str, Any]], backend: str, size: int, check: shards.Check) -> str:
    """Asserts that a check went well in all processes; why it was not made, or nothing."""
    found = [r for r in reports if (r["world"], r["check"]) == (f"{backend}-{size}", check.__name__)]
    faults = [report["fault"] for report in found if report["fault"]]
    assert not faults, "\n".join(faults)
    assert len(found) == size, "an earlier check of this world failed"
    return str(found[0]["skipped"])
