"""Runs of tasks that are put into words, and of objectives without a gradient, on a real Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import Launch
from tests.unit.test_worded import MODEL, SQUAD, SST2, write
from zoray.config import RunConfig
from zoray.errors import ConfigError, LedgerError
from zoray.ledger import Ledger

pytestmark = pytest.mark.usefixtures("warm")


def config(folder: Path, task: dict[str, Any], **keys: Any) -> RunConfig:
    base = {
        "model": str(MODEL), "max_steps": 3, "directions": 4, "per_direction_batch_size": 2, "learning_rate": 1e-3,
        "epsilon": 1e-2, "output_dir": str(folder / "runs"), "lr_scheduler_type": "constant",
        "optimizer": {"normalize": "none"},
    }  # fmt: skip
    return RunConfig.model_validate({**base, **keys, "task": {"max_length": 64, **task}})


def test_label_words_are_learnt_alike_by_one_replica_and_by_two(tmp_path: Path, launch: Launch) -> None:
    data = write(tmp_path / "data.parquet", SST2)
    task = {"template": "sst2", "train": data, "eval": data, "dev_samples": 2}
    one, two = (launch(config(tmp_path, task, replicas=n, max_steps=30, learning_rate=1e-2)) for n in (1, 2))
    assert one.finish.reason == two.finish.reason == "done" and one.ledger == two.ledger
    rows = list(two.folder.rows("evaluations"))
    assert [row["count"] for row in rows] == [2, 2]
    losses = [row["loss"] for row in two.folder.rows("steps")]
    assert sum(losses[-10:]) < sum(losses[:10]), "four sentences are soon known"


@pytest.mark.parametrize("objective", ["accuracy", "tests.unit.scores:margin"])
def test_what_has_no_gradient_is_minimised(tmp_path: Path, launch: Launch, objective: str) -> None:
    data = write(tmp_path / "data.jsonl", SST2)
    task = {"template": "sst2", "train": data, "eval": data}
    runs = [launch(config(tmp_path, task, objective=objective, replicas=n)) for n in (1, 2)]
    assert runs[0].ledger == runs[1].ledger
    header = Ledger.open(runs[0].folder.ledger, repair=False).header
    assert header["identity"]["objective"].startswith(objective)
    losses = [row["loss"] for row in runs[0].folder.rows("steps")]
    if objective == "accuracy":
        assert all(0 <= loss <= 1 and (loss * 16) % 1 == 0 for loss in losses)
    last = list(runs[0].folder.rows("evaluations"))[-1]
    assert last["count"] == 6 and (last["score"] != 0) == (objective != "accuracy")
    with pytest.raises((ConfigError, LedgerError), match="objective"):
        launch(config(tmp_path, task, objective="loss", max_steps=5), runs[0].folder)


def test_f1_of_generated_text_is_minimised_and_measured(tmp_path: Path, launch: Launch) -> None:
    rows = [{**row, "answers": {"text": ["the string", "a list of the"]}} for row in SQUAD]
    data = write(tmp_path / "data.parquet", rows)
    task = {"template": "squad", "train": data, "eval": data, "max_new_tokens": 8, "stop": "###"}
    one, two = (launch(config(tmp_path, task, objective="f1", replicas=n)) for n in (1, 2))
    assert one.ledger == two.ledger
    assert all(0 < row["loss"] <= 1 for row in one.folder.rows("steps"))
    first, last = (list(run.folder.rows("evaluations")) for run in (one, two))
    assert first == last and first[0]["loss"] > 1 and 0 <= first[0]["score"] <= 1


def test_a_function_that_is_nowhere_ends_the_run_before_it_begins(tmp_path: Path, launch: Launch) -> None:
    data = write(tmp_path / "data.jsonl", SST2)
    with pytest.raises(ConfigError, match=r"nowhere:f cannot be imported"):
        launch(config(tmp_path, {"template": "sst2", "train": data}, objective="nowhere:f"))
