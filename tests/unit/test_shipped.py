"""What is shipped beside the code: every configuration loads, and help is light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from zoray.config import WordedTask, load
from zoray.config.templates import TEMPLATES

ROOT = Path(__file__).parents[2]
TASKS = ("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad", "drop")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    config = load(str(path), [])
    assert config.task.eval is not None
    assert config.threads_per_replica == 1, "shipped runs must be comparable byte for byte"


def test_mezos_configurations_differ_in_the_task_alone() -> None:
    paths = sorted((ROOT / "configs" / "mezo").glob("*.yaml"))
    runs = [load(str(path)) for path in paths]
    assert {path.stem for path in paths} == set(TASKS) < set(TEMPLATES)
    for path, run in zip(paths, runs, strict=True):
        assert isinstance(run.task, WordedTask) and run.task.template == path.stem
        common = {"task", "per_device_eval_batch_size"}
        assert run.model_dump(exclude=common) == runs[0].model_dump(exclude=common)
        drawn = {"train_samples", "eval_samples", "max_length", "sample_seed"}
        assert run.task.model_dump(include=drawn) == runs[0].task.model_dump(include=drawn)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['zoray', '--help']\nfrom launch.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'pydantic', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert "resume" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == "[]"
