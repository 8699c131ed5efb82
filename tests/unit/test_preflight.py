"""What is refused before anything starts."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.preflight import (
    PROCESS_BYTES,
    check_libraries,
    check_memory,
    check_paths,
    check_port,
    check_trackers,
    count_weights,
    host_bytes,
)
from zoray.config import RunConfig
from zoray.errors import ConfigError, DataError, ModelError, ResourceError


def config(model: Path | str, train: Path | str = "t", **keys: Any) -> RunConfig:
    task = {"kind": "causal_lm", "train": str(train), **keys.pop("task", {})}
    return RunConfig.model_validate({"model": str(model), "max_steps": 1, "task": task, **keys})


def weights(folder: Path, *shapes: list[int], name: str = "model.safetensors") -> Path:
    """A safetensors file that is nothing but its header: only shapes are read."""
    entries = {f"w{i}": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for i, shape in enumerate(shapes)}
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("launch.preflight.psutil.virtual_memory", lambda: SimpleNamespace(available=count))


def test_weights_are_counted_over_all_files(tmp_path: Path) -> None:
    weights(tmp_path, [3, 4], [5], name="a.safetensors")
    assert count_weights(weights(tmp_path, [], [2, 2, 2], name="b.safetensors")) == 12 + 5 + 1 + 8


def test_weights_of_a_real_model(tmp_path: Path, tiny_model: Any) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model("llama", tmp_path)
    assert count_weights(folder) == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())


def test_what_cannot_be_counted_is_left_to_the_replica(tmp_path: Path) -> None:
    assert count_weights(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"xxxxx")
    assert count_weights(tmp_path) is None
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "nowhere")
    assert count_weights(tmp_path) is None


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_memory_is_enough_or_not_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, width: int
) -> None:
    run = config(weights(tmp_path / "m", [1 << 15, 1 << 15]), replicas=3, dtype=dtype)
    each = width * (1 << 30) + (400 << 20)
    free(monkeypatch, 3 * each)
    check_memory(run)
    free(monkeypatch, 3 * each - 1)
    with pytest.raises(ResourceError, match="3 replicas of") as caught:
        check_memory(run)
    assert "at most 2 replicas" in str(caught.value.advice)
    assert caught.value.exit_code == 7


def test_replicas_elsewhere_need_no_memory_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = weights(tmp_path / "m", [1 << 15, 1 << 15])
    free(monkeypatch, 0)
    check_memory(config(folder, gpus_per_replica=1.0))
    check_memory(config("a-name-on-the-hub"))
    with pytest.raises(ResourceError):
        check_memory(config(folder))
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    check_memory(config(folder))


def test_missing_files(tmp_path: Path, tiny_model: Any) -> None:
    model, data = tiny_model("gpt2", tmp_path), tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    check_paths(config(model, data))
    with pytest.raises(ModelError, match="no folder"):
        check_paths(config(tmp_path / "missing", data))
    with pytest.raises(DataError, match="no such file") as caught:
        check_paths(config(model, tmp_path / "train.jsonl"))
    assert caught.value.where == str(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="no such file"):
        check_paths(config(model, data, task={"eval": str(tmp_path / "eval.jsonl")}))


def data(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_first_rows_are_read_before_anything_starts(tmp_path: Path, tiny_model: Any) -> None:
    model = tiny_model("gpt2", tmp_path)
    good = data(tmp_path / "good.jsonl", {"text": "a", "label": 1})
    check_paths(config(model, good, task={"eval": str(good)}))
    for rows, words in (([], "empty"), ([{"body": "a"}], "text"), ([{"text": None}], "text"), ([{"text": 3}], "text")):
        with pytest.raises(DataError, match=words):
            check_paths(config(model, data(tmp_path / "bad.jsonl", *rows)))
        with pytest.raises(DataError, match=words):
            check_paths(config(model, good, task={"eval": str(tmp_path / "bad.jsonl")}))
    task = {"kind": "classification", "label_column": "stars"}
    with pytest.raises(DataError, match="stars"):
        check_paths(config(model, good, task=task))


def test_a_taken_port_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"Port {port} is already in use"):
            check_port(config("m", metrics_port=port))
        # There the port is another machine's affair.
        monkeypatch.setenv("RAY_ADDRESS", "head:6379")
        check_port(config("m", metrics_port=port))
    monkeypatch.delenv("RAY_ADDRESS")
    check_port(config("m", metrics_port=port))
    check_port(config("m", metrics_port=0))


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("actors.trackers.base.installed", lambda name: False)
    check_trackers(config("m"))
    with pytest.raises(ConfigError, match="tensorboard is not installed") as caught:
        check_trackers(config("m", report_to="tensorboard"))
    assert "pip install 'zoray[tensorboard]'" in str(caught.value.advice)
    # There it is another machine's affair.
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    check_trackers(config("m", report_to="tensorboard"))


@pytest.mark.parametrize("package", ["deepspeed", "accelerate"])
def test_sharding_without_its_libraries_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setattr("launch.preflight.find_spec", lambda name: None if name == package else object())
    sharded = config("some/model", memory={"kind": "zero3", "shards": 2})
    with pytest.raises(ConfigError, match=f"need {package}") as caught:
        check_libraries(sharded)
    assert "zoray[zero3]" in str(caught.value.advice)
    check_libraries(config("some/model"))
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    check_libraries(sharded)


def test_memory_of_all_processes_of_a_sharded_replica_counts() -> None:
    zero3 = {"kind": "zero3", "shards": 3}
    assert host_bytes(config("m"), 1000) == 4000 + PROCESS_BYTES
    assert host_bytes(config("m", memory=zero3, dtype="bfloat16"), 1000) == 2000 + 3 * PROCESS_BYTES
    in_files = {**zero3, "offload": "nvme", "nvme_path": "/fast"}
    assert host_bytes(config("m", memory=in_files), 1000) == 3 * PROCESS_BYTES
