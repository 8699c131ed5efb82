"""Experiment trackers: one contract for every one that is installed, and what a run does when one fails or hangs."""

from __future__ import annotations

import json
import math
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from actors.exporter import Exporter
from actors.journal import Journal
from actors.trackers import Trackers, chosen, installed, require
from actors.trackers.feed import Feed
from actors.trackers.reports import flatten, mean
from tests.unit.test_journal import record
from zoray.config import RunConfig
from zoray.errors import ConfigError
from zoray.protocol import Counters, Evaluation
from zoray.runs import RunFolder

NAMES = ("tensorboard", "mlflow", "wandb")
Curves = dict[str, dict[int, float]]


def config(report_to: Any = "none", **keys: Any) -> RunConfig:
    task = {"kind": "causal_lm", "train": "t", "eval": "e"}
    return RunConfig.model_validate({"model": "m", "max_steps": 100, "task": task, "report_to": report_to, **keys})


def row(step: int, loss: float = 1.0, **keys: float) -> dict[str, float]:
    whole = {
        "step": step, "loss": loss, "learning_rate": 0.5, "gradient_rms": 2.0,
        "gradient_noise": 0.5, "step_factor": 1.0, "nonfinite": 0, "clipped": 0,
        "directions": 4,
        "replicas": 2, "seconds": 2.0, "probe_seconds": 1.5, "commit_seconds": 0.25, "wait_seconds": 0.25,
        "tokens": 64.0, "sent": 10.0 * (step + 1), "received": 20.0 * (step + 1),
    }  # fmt: skip
    return {**whole, **keys}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    path = tmp_path / "runs" / "r"
    (path / "metrics").mkdir(parents=True)
    return RunFolder(path)


# ---- the contract ----


def read_tensorboard(folder: RunFolder) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder.tensorboard), size_guidance={"scalars": 0}).Reload()
    curves: Curves = {}
    for tag in found.Tags()["scalars"]:
        events = found.Scalars(tag)
        curves[tag] = {event.step: event.value for event in events}
        assert len(curves[tag]) == len(events), f"{tag} has a step twice"
    return curves


def read_mlflow(folder: RunFolder) -> Curves:
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.run_name == folder.name
    curves: Curves = {}
    for name in run.data.metrics:
        history = sorted(client.get_metric_history(run.info.run_id, name), key=lambda m: m.timestamp)
        curves[name] = {metric.step: metric.value for metric in history}
    return curves


def read_wandb(folder: RunFolder) -> Curves:
    from wandb.proto.wandb_internal_pb2 import Record

    curves: Curves = {}
    ids = set()
    for path in sorted((folder.path / "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(path.read_bytes()):
            found = Record()
            found.ParseFromString(data)
            if found.HasField("run"):
                ids.add(found.run.run_id)
            items = found.history.item if found.HasField("history") else ()
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            for name, value in values.items():
                if not name.startswith("_") and name != "train/global_step":
                    curves.setdefault(name, {})[int(values["train/global_step"])] = value
    assert len(ids) == 1
    return curves


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's log format after a head of seven bytes."""
    block, at, whole = 32768, 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if kind == 0:
            at += block - at % block
            continue
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        # Whole, or the last part.
        if kind in (1, 4):
            yield whole
            whole = b""


READERS: dict[str, Callable[[RunFolder], Curves]] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "wandb": read_wandb,
}


@pytest.fixture(params=NAMES)
def tracker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a tracker that is installed and works on this machine alone."""
    if not installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return str(request.param)


def ended(trackers: Trackers, reason: str | None = "done") -> None:
    trackers.close(reason, patience=120)
    assert trackers.dropped() == []


def test_what_is_told_can_be_read(tracker: str, folder: RunFolder) -> None:
    trackers = Trackers(config(tracker, logging_steps=2), folder)
    trackers.begin(0)
    trackers.evaluation(0, Evaluation(3.0, 0.5, 10, 5))
    for step in range(4):
        trackers.step(row(step, loss=float(step)), Counters(lost=step))
    trackers.evaluation(4, Evaluation(2.0, 0.25, 10, 0))
    ended(trackers)
    curves = READERS[tracker](folder)
    assert curves["train/loss"] == {2: 0.5, 4: 2.5}
    assert curves["train/learning_rate"] == {2: 0.5, 4: 0.5}
    assert curves["train/tokens_per_second"] == {2: 32.0, 4: 32.0}
    assert curves["cluster/exchanged_bytes_per_step"] == {2: 30.0, 4: 30.0}
    assert curves["faults/lost"] == {2: 1.0, 4: 3.0}
    assert curves["eval/loss"] == {0: 3.0, 4: 2.0} and curves["eval/accuracy"] == {0: 0.5}


def test_a_resumed_run_goes_on_where_it_was(tracker: str, folder: RunFolder) -> None:
    told = config(tracker, logging_steps=1)
    for start in (0, 3):
        trackers = Trackers(told, folder)
        trackers.begin(start)
        for step in range(start, start + 3):
            trackers.step(row(step, loss=float(step)), Counters())
        # None: as of a coordinator that is killed.
        ended(trackers, None if start == 0 else "done")
    assert READERS[tracker](folder)["train/loss"] == {step + 1: float(step) for step in range(6)}


@pytest.mark.parametrize("resumed", [False, True])
def test_steps_that_are_computed_again_count_once(tracker: str, folder: RunFolder, resumed: bool) -> None:
    told = config(tracker, logging_steps=1)
    trackers = Trackers(told, folder)
    trackers.begin(0)
    for step in range(5):
        if step == 2:
            trackers.evaluation(step, Evaluation(9.0, 0.1, 1, 0))
        trackers.step(row(step, loss=100.0 + step), Counters())
    if resumed:
        ended(trackers, None)
        trackers = Trackers(told, folder)
    trackers.begin(2)
    for step in range(2, 6):
        trackers.step(row(step, loss=float(step)), Counters())
    ended(trackers)
    curves = READERS[tracker](folder)
    assert curves["train/loss"] == {1: 100.0, 2: 101.0, 3: 2.0, 4: 3.0, 5: 4.0, 6: 5.0}
    # It is of weights that stayed.
    assert curves["eval/loss"] == {2: 9.0}


def test_tensorboard_forgets_what_is_not_true_any_more(folder: RunFolder) -> None:
    if not installed("tensorboard"):
        pytest.skip("tensorboard is not installed")
    trackers = Trackers(config("tensorboard", logging_steps=1), folder)
    trackers.begin(0)
    for step in range(5):
        trackers.step(row(step), Counters())
    trackers.begin(2)
    ended(trackers, "stopped")
    assert list(read_tensorboard(folder)["train/loss"]) == [1, 2]


def test_tensorboard_shows_the_configuration(folder: RunFolder) -> None:
    if not installed("tensorboard"):
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    trackers = Trackers(config("tensorboard", epsilon=0.125), folder)
    trackers.begin(0)
    ended(trackers)
    found = EventAccumulator(str(folder.tensorboard)).Reload()
    (event,) = found.Tensors(found.Tags()["tensors"][0])
    text = make_ndarray(event.tensor_proto).item().decode()
    assert "| epsilon | 0.125 |" in text and "| task.kind | causal_lm |" in text


# ---- the run does not depend on them ----


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def begin(self, step: int) -> None:
        self.told.append(("begin", step))

    def log(self, step: int, values: Mapping[str, float], time: float) -> None:
        self.told.append(("log", step, dict(values)))

    def close(self, reason: str | None) -> None:
        self.told.append(("close", reason))


class Failing(Recorder):
    def log(self, step: int, values: Mapping[str, float], time: float) -> None:
        raise ConnectionError("the server is gone\nfor good")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """The trackers that are opened, by name; tensorboard and wandb keep what they are told, mlflow fails."""
    opened: dict[str, Recorder] = {}

    def make(name: str, folder: RunFolder, settings: Mapping[str, Any]) -> Recorder:
        opened[name] = Failing() if name == "mlflow" else Recorder()
        return opened[name]

    monkeypatch.setattr("actors.trackers.reports.make", make)
    return opened


def logged(recorder: Recorder) -> dict[int, dict[str, float]]:
    return {told[1]: told[2] for told in recorder.told if told[0] == "log"}


def test_means_are_over_the_steps_since_the_last_report(made: dict[str, Recorder], folder: RunFolder) -> None:
    trackers = Trackers(config("tensorboard", logging_steps=3), folder)
    trackers.begin(4)
    for step, loss in ((4, 1.0), (5, math.nan), (6, 5.0), (7, 7.0)):
        trackers.step(row(step, loss=loss), Counters())
    trackers.close("done")
    found = logged(made["tensorboard"])
    # The last report is of the steps that are left.
    assert {step: values["train/loss"] for step, values in found.items()} == {6: 1.0, 8: 6.0}
    assert made["tensorboard"].told[0] == ("begin", 4) and made["tensorboard"].told[-1] == ("close", "done")


def test_no_value_is_told_where_there_is_none(made: dict[str, Recorder], folder: RunFolder) -> None:
    trackers = Trackers(config("tensorboard", logging_steps=1), folder)
    trackers.begin(0)
    trackers.step(row(0, loss=math.nan, seconds=0.0), Counters())
    trackers.close("numerics")
    (values,) = logged(made["tensorboard"]).values()
    assert "train/loss" not in values and "train/tokens_per_second" not in values
    assert all(math.isfinite(value) for value in values.values())


def test_nothing_is_opened_before_the_run_begins(made: dict[str, Recorder], folder: RunFolder) -> None:
    Trackers(config("tensorboard"), folder).close(None)
    assert made == {}


def test_one_that_fails_is_dropped_with_one_warning_and_the_others_go_on(
    made: dict[str, Recorder], folder: RunFolder
) -> None:
    told = config(["mlflow", "wandb"], logging_steps=1)
    journal = Journal(folder, Exporter("r", "m", 10), 10, Trackers(told, folder))
    journal.begin(0, "", 64.0)
    journal.rewound(0)
    for step in range(5):
        journal.report(record(step))
    journal.finished(1)
    (text,) = journal.progress.warnings
    assert text == "mlflow gets no more reports of this run: ConnectionError: the server is gone"
    assert list(logged(made["wandb"])) == [1, 2, 3, 4, 5] and made["wandb"].told[-1] == ("close", "done")
    assert journal.progress.step == 5


def test_one_that_cannot_be_opened_is_dropped(monkeypatch: pytest.MonkeyPatch, folder: RunFolder) -> None:
    def make(*arguments: Any) -> Any:
        raise SystemExit

    monkeypatch.setattr("actors.trackers.reports.make", make)
    trackers = Trackers(config("wandb"), folder)
    trackers.begin(0)
    trackers.close("done")
    assert trackers.dropped() == ["wandb gets no more reports of this run: SystemExit"]
    assert trackers.dropped() == []


def test_one_that_hangs_does_not_hold_up_the_run() -> None:
    opened, let_go = threading.Event(), threading.Event()

    def hang() -> Recorder:
        opened.set()
        let_go.wait()
        return Recorder()

    feed = Feed("wandb", hang, waiting=2)
    opened.wait()
    for _ in range(2):
        feed.put(lambda tracker: tracker.begin(0))
    assert feed.fault is None
    feed.put(lambda tracker: tracker.begin(0))
    assert feed.fault == "2 reports wait for it"
    feed.close(lambda tracker: tracker.close(None), patience=0.01)
    late = Feed("wandb", hang)
    late.close(lambda tracker: tracker.close(None), patience=0.01)
    assert late.fault is not None and "last reports" in late.fault
    let_go.set()


# ---- which trackers ----


def test_the_names_in_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(config()) == ()
    assert chosen(config([])) == ()
    assert chosen(config("mlflow")) == ("mlflow",)
    assert chosen(config(["wandb", "tensorboard", "wandb"])) == ("wandb", "tensorboard")
    monkeypatch.setattr("actors.trackers.base.installed", lambda name: name != "wandb")
    assert chosen(config("all")) == ("tensorboard", "mlflow")
    require(config("all"))


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.trackers.base.installed", lambda name: name == "tensorboard")
    require(config("tensorboard"))
    with pytest.raises(ConfigError, match="mlflow and wandb are not installed on head") as caught:
        require(config(["mlflow", "tensorboard", "wandb"]), "head")
    assert "pip install 'zoray[mlflow,wandb]'" in str(caught.value.advice)


def test_a_folder_of_a_trackers_name_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not installed("zoray_no_such_tracker")  # type: ignore[arg-type]
    (tmp_path / "zoray_no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not installed("zoray_no_such_tracker")  # type: ignore[arg-type]
    (tmp_path / "zoray_no_such_tracker" / "__init__.py").touch()
    assert installed("zoray_no_such_tracker")  # type: ignore[arg-type]


def test_flatten_and_mean() -> None:
    assert flatten({"a": 1, "b": {"c": [2], "d": {"e": None}}}) == {"a": 1, "b.c": [2], "b.d.e": None}
    assert mean([1.0, math.nan, 3.0, math.inf]) == 2.0
    assert math.isnan(mean([math.nan]))
