"""A real local Ray for all integration tests, and small runs on it; the coordinator runs in the test's process."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SENTENCES, make_model
from tests.integration.warm import WarmFleet
from zoray.config import RunConfig
from zoray.runs import RunFolder


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[None]:
    import ray

    # Replicas inherit the environment of the raylet, with what it says of the S3 server. Machines with an accelerator
    # may be without one.
    if importlib.util.find_spec("moto") is not None:
        request.getfixturevalue("s3_server")
    os.environ["ZORAY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@dataclass(frozen=True)
class Inputs:
    """A folder with models and data, and the configuration that names them."""

    folder: Path
    base: dict[str, Any]

    def config(self, **keys: Any) -> RunConfig:
        return RunConfig.model_validate({**self.base, **keys})


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"text": " ".join(SENTENCES[(i * j) % 7] for j in range(4)), "label": i % 2} for i in range(40)]
    for name, part in (("train", rows[:30]), ("eval", rows[30:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    base = {
        "model": str(make_model("gpt2", folder)),
        "task": {
            "kind": "causal_lm",
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_length": 16,
        },
        "max_steps": 6,
        "directions": 4,
        "per_direction_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "optimizer": {"normalize": "none"},
        "epsilon": 1e-3,
        "eval_steps": 3,
        "output_dir": str(folder / "runs"),
    }
    return Inputs(folder, base)


@dataclass(frozen=True)
class Ran:
    """A run that ended."""

    folder: RunFolder
    finish: Any
    coordinator: Any

    @property
    def ledger(self) -> bytes:
        return (self.folder.ledger / "commits.bin").read_bytes()


Launch = Callable[..., Ran]


@pytest.fixture
def launch(local_ray: None) -> Iterator[Launch]:
    """`launch(config, folder=None, at=None)`: run to the end; `at(coordinator, record)` is called at every report."""
    from actors.coordinator import Coordinator

    started: list[Any] = []

    def run(config: RunConfig, folder: RunFolder | None = None, at: Callable[[Any, Any], None] | None = None) -> Ran:
        place = folder or RunFolder.create(config, "test")
        coordinator = Coordinator(config, str(place.path))
        started.append(coordinator)
        coordinator.prepare(folder is not None)
        if at is not None:
            report = coordinator.journal.report

            def reported(record: Any) -> None:
                report(record)
                at(coordinator, record)

            coordinator.journal.report = reported
        return Ran(place, coordinator.run(), coordinator)

    yield run
    for coordinator in started:
        coordinator.roster.close()
        coordinator.exporter.close()
        coordinator.lock.release()


@pytest.fixture(scope="session")
def processes(local_ray: None) -> Iterator[list[Any]]:
    import ray

    idle: list[Any] = []
    yield idle
    for actor in idle:
        ray.kill(actor)


@pytest.fixture
def warm(processes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the replicas of a test come from processes that have been replicas before."""
    monkeypatch.setattr(WarmFleet, "idle", processes, raising=False)
    monkeypatch.setattr("actors.roster.Fleet", WarmFleet)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of the weights with which replicas have joined, before they replay."""
    from actors.admission import Admission

    original, steps = Admission._joined, list[int]()

    def noted(self: Admission, name: str, result: tuple[int, tuple[str, ...]]) -> None:
        steps.append(result[0])
        original(self, name, result)

    monkeypatch.setattr(Admission, "_joined", noted)
    return steps
