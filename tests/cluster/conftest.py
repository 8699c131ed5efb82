"""Several real raylets on one machine; commands in processes of their own; the undisturbed run to compare with."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster import plain
from tests.cluster.helpers import ROOT, Machines, Result, Workplace, ledger_of
from tests.conftest import make_model
from tests.integration.conftest import Inputs
from tests.integration.conftest import inputs as inputs
from zoray.config import RunConfig

STEPS = 200


@pytest.fixture(scope="session")
def brake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("brake") / "steps"


@pytest.fixture(scope="session")
def environment(brake: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """That of a user who has not set anything of Ray's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = f"{Path(__file__).with_name('brake')}:{ROOT}"
    # A job of the cluster's finds the command as in an image: on the PATH.
    commands = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {
        "PATH": commands,
        "PYTHONPATH": path,
        "ZORAY_TEST_BRAKE": str(brake),
        "ZORAY_CACHE": str(tmp_path_factory.mktemp("cache")),
    }
    return {**kept, **own, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="session")
def on_cluster(environment: dict[str, str]) -> dict[str, str]:
    return {**environment, "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="session")
def machines(on_cluster: dict[str, str]) -> Iterator[Machines]:
    """One cluster for all tests; each says with `have` how many raylets it begins with."""
    cluster = Machines(on_cluster)
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def config(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run.yaml of all tests."""
    model = make_model("gpt2", tmp_path_factory.mktemp("model"), n_layer=1)
    keys = {
        **inputs.base, "model": str(model), "max_steps": STEPS, "directions": 3, "eval_steps": None,
        "eval_on_start": False, "output_dir": "runs", "replicas": 1,
    }  # fmt: skip
    return yaml.safe_dump(keys)


def place(folder: Path, config: str, env: dict[str, str], brake: Path) -> Iterator[Workplace]:
    (folder / "run.yaml").write_text(config)
    made = Workplace(folder, env, brake)
    made.full_speed()
    yield made
    made.close()


@pytest.fixture
def workplace(
    machines: Machines, config: str, on_cluster: dict[str, str], brake: Path, tmp_path: Path
) -> Iterator[Workplace]:
    """Where commands are run that find the cluster through RAY_ADDRESS."""
    yield from place(tmp_path, config, {**on_cluster, "RAY_ADDRESS": machines.address}, brake)


@pytest.fixture
def alone(config: str, environment: dict[str, str], brake: Path, tmp_path: Path) -> Iterator[Workplace]:
    """Where commands are run that know of no cluster."""
    yield from place(tmp_path, config, environment, brake)


@pytest.fixture(scope="session")
def undisturbed(config: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What comes of the run when nothing happens to it."""
    keys = {**yaml.safe_load(config), "output_dir": str(tmp_path_factory.mktemp("undisturbed"))}
    folder, finish = plain.undisturbed(RunConfig.model_validate(keys))
    assert finish.reason == "done" and finish.digest is not None
    return Result(ledger_of(folder), finish.step, f"{finish.digest:016x}")
