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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random OPT and the data that stand in for MeZO's."""
    folder = tmp_path_factory.mktemp("small")
    script = ROOT / "configs" / "mezo" / "make_small.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_mezos_tasks_run_on_the_stand_in(name: str, small: Path) -> None:
    from zoray.models import load_model, load_tokenizer
    from zoray.replica import Replica
    from zoray.tasks import batch_for, load_task

    data = small / "data" / name
    keys = [f"model={small / 'model'}", "dtype=float32", "task.max_length=256", "task.dev_samples=20"]
    keys += [f"task.train={data / 'train'}", f"task.eval={data / 'validation'}", "per_direction_batch_size=3"]
    config = load(str(ROOT / "configs" / "mezo" / f"{name}.yaml"), keys)
    task = load_task(config, load_tokenizer(config))
    assert (task.train_size, task.eval_size, task.warnings) == (100, 20, [])
    replica = Replica(load_model(config), direction="gaussian", objective=task.objective)
    batch = batch_for(task, config, 0, 0, 0)
    replica.prove(batch, config.epsilon)
    probe = replica.probe(0, 0, batch, config.epsilon)
    assert 0.1 < probe.loss < 8 and probe.projected_gradient != 0
    _, _, count, correct, score = replica.evaluate(task.eval_batch(0)).summary()
    assert 0 < count <= 20 and 0 <= correct <= count and 0 <= score <= count


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['zoray', '--help']\nfrom launch.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'pydantic', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert "resume" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == "[]"
