"""Runs on a real Ray: the number of replicas, stops and resumptions do not change one byte of the ledger."""

from __future__ import annotations

import json
import shutil
import urllib.request
from typing import Any

import pytest

from tests.conftest import make_model
from tests.integration.conftest import Inputs, Launch
from zoray.errors import ConfigError, DataError, LedgerError, ModelError, ResourceError, ZorayError
from zoray.ledger import Ledger
from zoray.runs import RunFolder

pytestmark = pytest.mark.usefixtures("warm")


def digests(folder: RunFolder) -> dict[int, str]:
    return {row["step"]: row["digest"] for row in folder.rows("digests")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_number_of_replicas_does_not_change_the_ledger(dtype: str, inputs: Inputs, launch: Launch) -> None:
    runs = [launch(inputs.config(replicas=n, dtype=dtype)) for n in (1, 2, 3)]
    assert [run.finish.reason for run in runs] == ["done"] * 3
    assert runs[0].ledger == runs[1].ledger == runs[2].ledger
    assert {digests(run.folder)[6] for run in runs} == {f"{runs[0].finish.digest:016x}"}
    # Two or more also compare theirs when they join.
    assert digests(runs[1].folder)[0] == digests(runs[2].folder)[0]
    assert [run.coordinator.state.counters.diverged for run in runs] == [0, 0, 0]
    evaluations = [[row["loss"] for row in run.folder.rows("evaluations")] for run in runs]
    assert evaluations[0] == evaluations[1] == evaluations[2] and len(evaluations[0]) == 3


def test_microbatches_schedules_and_decay(inputs: Inputs, launch: Launch) -> None:
    keys = {"microbatches": 2, "lr_scheduler_type": "linear", "weight_decay": 0.1, "max_projected_gradient": 0.05}
    one, two = (launch(inputs.config(replicas=n, **keys)) for n in (1, 2))
    assert one.ledger == two.ledger
    commits = list(Ledger.open(one.folder.ledger, repair=False).commits())
    assert all(commit.decay < 1 for commit in commits)
    assert sum(row["clipped"] for row in one.folder.rows("steps")) > 0


def test_a_classification_with_lora(inputs: Inputs, launch: Launch) -> None:
    model = make_model("bert", inputs.folder)
    task = {**inputs.base["task"], "kind": "classification"}
    keys = {"model": str(model), "task": task, "trainable": {"lora": {"r": 2, "target_modules": ["query"]}}}
    one, two = (launch(inputs.config(replicas=n, learning_rate=0.1, **keys)) for n in (1, 2))
    assert one.ledger == two.ledger
    last = list(two.folder.rows("evaluations"))[-1]
    assert last["count"] == 10 and 0 <= last["correct"] <= 10


REMEMBERS = {
    "microbatches": 2,
    "optimizer": {"momentum": 0.5, "nesterov": True, "normalize": "second_moment", "max_directions": 9},
}


CURVED = {
    "estimator": "one_sided",
    "lr_scheduler_type": "linear",
    "directions_per_batch": 3,
    "optimizer": {"shaping": "centered", "normalize": "curvature", "momentum": 0.5, "momentum_window": 5},
}


SPLIT = {
    "signs": "sequential",
    "split_signs": True,
    "lr_scheduler_type": "linear",
    "optimizer": {"normalize": "curvature", "max_directions": 9, "momentum": 0.5, "momentum_window": 5},
}


@pytest.mark.parametrize(
    ("step", "keys"), [(0, {}), (1, {}), (3, {}), (5, {}), (2, REMEMBERS), (2, CURVED), (2, SPLIT)]
)
def test_a_run_stopped_at_any_step_and_resumed_has_the_same_ledger(
    step: int, keys: dict[str, Any], inputs: Inputs, launch: Launch
) -> None:
    undisturbed = launch(inputs.config(**keys))

    def stop(coordinator: Any, record: Any) -> None:
        if record.step == step and record.aggregate is not None:
            coordinator.stop()

    first = launch(inputs.config(save_steps=2, **keys), at=stop)
    if step < 5:
        assert first.finish.reason == "stopped"
    assert first.finish.step <= step + 2
    assert digests(first.folder)[first.finish.step] == f"{first.finish.digest:016x}"
    again = launch(inputs.config(replicas=1, save_steps=2, **keys), first.folder)
    assert again.finish.reason == "done"
    assert again.ledger == undisturbed.ledger
    commits = list(Ledger.open(again.folder.ledger, repair=False).commits())
    assert all(bool(commit.notes) == bool(keys) for commit in commits)
    assert {s for s, *_ in commits[-1].terms} == ({1, 2, 3, 4, 5} if keys else {5})
    if keys in (CURVED, SPLIT):
        # What the halves of the batches tell has crossed.
        assert commits[-1].notes[5] > 0
    assert again.finish.digest == undisturbed.finish.digest


def test_a_damaged_snapshot_is_passed_over(inputs: Inputs, launch: Launch) -> None:
    def stop(coordinator: Any, record: Any) -> None:
        if record.step == 4:
            coordinator.stop()

    first = launch(inputs.config(save_steps=2, replicas=1), at=stop)
    weights = first.folder.snapshots / "step-4" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    shutil.rmtree(first.folder.snapshots / "step-2")
    again = launch(inputs.config(replicas=1), first.folder)
    assert again.ledger == launch(inputs.config(replicas=1)).ledger


def test_only_scalars_cross_and_the_ledger_is_small(inputs: Inputs, launch: Launch) -> None:
    run = launch(inputs.config(max_steps=8, eval_steps=None, eval_on_start=False, replicas=2))
    steps, directions = 8, 4
    per_replica_and_step = 65 + directions
    row = list(run.folder.rows("steps"))[-1]
    # Beside the probes and the commits, each replica gives its digest once, to show that it is right.
    assert row["sent"] + row["received"] <= steps * (directions * 50 + 2 * per_replica_and_step) + 2 * 46
    sizes = [len(c.encode()) for c in Ledger.open(run.folder.ledger, repair=False).commits()]
    assert max(sizes) <= directions + 96


def test_metrics_and_health_are_served_during_the_run(inputs: Inputs, launch: Launch) -> None:
    pages: dict[int, tuple[str, dict[str, Any]]] = {}

    def scrape(coordinator: Any, record: Any) -> None:
        port = coordinator.journal.progress.metrics_url.rsplit(":", 1)[1].split("/")[0]
        text, health = (
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10).read().decode()
            for path in ("/metrics", "/health")
        )
        pages[record.step] = text, json.loads(health)

    run = launch(inputs.config(), at=scrape)
    text, health = pages[3]
    name = run.folder.name
    assert f'zoray_committed_steps{{run="{name}"}} 4.0' in text
    assert f'zoray_eval_loss{{run="{name}"}}' in text and f'flow="sent",run="{name}"' in text
    assert health["ok"] is True and health["run"] == name


def nan_model(inputs: Inputs) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = inputs.folder / "nan"
    model = AutoModelForCausalLM.from_pretrained(inputs.base["model"])
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(inputs.base["model"]).save_pretrained(folder)
    return str(folder)


def test_nan_from_the_first_step_ends_with_advice(inputs: Inputs, launch: Launch) -> None:
    run = launch(inputs.config(model=nan_model(inputs), max_steps=50))
    assert run.finish.reason == "numerics"
    assert "first step" in run.finish.text and run.finish.advice
    commits = list(Ledger.open(run.folder.ledger, repair=False).commits())
    assert len(commits) == 5 and not any(commit.applied for commit in commits)


BAD: list[tuple[dict[str, Any], type[ZorayError], str]] = [
    ({"task": {"text_column": "words"}}, DataError, "words"),
    ({"task": {"max_length": 100}}, ConfigError, "100"),
    ({"trainable": "no_such_layer"}, ConfigError, "no_such_layer"),
    ({"model": "/no/such/model"}, ModelError, "/no/such/model"),
    ({"task": {"train": "/no/such/data.jsonl"}}, DataError, "/no/such/data.jsonl"),
    ({"gpus_per_replica": 1.0}, ResourceError, "GPU"),
]


@pytest.mark.parametrize(("keys", "kind", "text"), BAD)
def test_bad_input_is_the_users_error_and_not_rays(
    keys: dict[str, Any], kind: type[ZorayError], text: str, inputs: Inputs, launch: Launch
) -> None:
    task = {**inputs.base["task"], **keys.get("task", {})}
    with pytest.raises(kind, match=text) as caught:
        launch(inputs.config(**{"replicas": 1, **keys, "task": task}))
    assert type(caught.value) is kind
    assert "Traceback" not in str(caught.value)


def test_labels_out_of_range_name_the_row(inputs: Inputs, launch: Launch) -> None:
    model = make_model("bert", inputs.folder)
    task = {**inputs.base["task"], "kind": "classification", "num_labels": 2}
    path = inputs.folder / "labels.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 7}\n')
    with pytest.raises(DataError, match="7"):
        launch(inputs.config(model=str(model), task={**task, "train": str(path)}, replicas=1))


def test_a_ledger_of_another_model_is_refused(inputs: Inputs, launch: Launch) -> None:
    from transformers import AutoModelForCausalLM

    folder = inputs.folder / "changing"
    shutil.copytree(inputs.base["model"], folder)

    def stop(coordinator: Any, record: Any) -> None:
        coordinator.stop()

    first = launch(inputs.config(model=str(folder), replicas=1), at=stop)
    before = first.ledger
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_input_embeddings().weight.data[0, 0] += 0.5
    model.save_pretrained(folder)
    with pytest.raises(LedgerError, match="base model"):
        launch(inputs.config(model=str(folder), replicas=1), first.folder)
    with pytest.raises(LedgerError, match="epsilon"):
        launch(inputs.config(model=str(folder), replicas=1, epsilon=1e-2), first.folder)
    assert (first.folder.ledger / "commits.bin").read_bytes() == before


def test_a_taken_port_is_refused(inputs: Inputs, launch: Launch) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(ResourceError, match="in use"):
            launch(inputs.config(metrics_port=taken.getsockname()[1], replicas=1))
