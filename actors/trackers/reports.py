"""From the journal's rows to what trackers are told: means over `logging_steps` steps, under Hugging Face's names."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from actors.trackers.base import Tracker, chosen, make
from actors.trackers.feed import Feed
from zoray.config import RunConfig
from zoray.protocol import Counters, Evaluation
from zoray.runs import RunFolder

_PATIENCE = 30.0
"""Seconds a run that has ended waits for its trackers."""

_MEANS = {
    "train/loss": "loss",
    "train/projected_gradient_rms": "gradient_rms",
    "train/gradient_noise_ratio": "gradient_noise",
    "train/step_factor": "step_factor",
    "train/nonfinite_directions": "nonfinite",
    "train/clipped_directions": "clipped",
    "train/directions": "directions",
    "time/step_seconds": "seconds",
    "time/probe_seconds": "probe_seconds",
    "time/commit_seconds": "commit_seconds",
    "time/wait_seconds": "wait_seconds",
    "cluster/replicas": "replicas",
}

Row = Mapping[str, float]


class Trackers:
    """All trackers of a run.

    Args:
        config: of the run.
        folder: of the run.
    """

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self._config, self._folder = config, folder
        self._feeds: list[Feed] | None = None
        self._dropped: list[str] = []
        self._rows: list[Row] = []
        self._exchanged = 0.0
        self._faults = Counters()

    def begin(self, step: int) -> None:
        """The run goes on from the weights of a step; whatever was told of later ones is void."""
        if self._feeds is None:
            settings = flatten(self._config.model_dump(mode="json"))
            self._feeds = [Feed(name, partial(make, name, self._folder, settings)) for name in chosen(self._config)]
        self._rows = [row for row in self._rows if row["step"] < step]
        self._tell(lambda tracker: tracker.begin(step))

    def step(self, row: Row, faults: Counters) -> None:
        """A step is committed: its row of the run's table, and the faults met so far."""
        self._rows.append(row)
        self._faults = faults
        if (int(row["step"]) + 1) % self._config.logging_steps == 0:
            self._summarise()

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """An evaluation of the weights of a step is in."""
        values = {"eval/loss": evaluation.loss, "eval/standard_error": evaluation.standard_error}
        if evaluation.correct:
            values["eval/accuracy"] = evaluation.correct / evaluation.count
        if evaluation.score:
            values["eval/score"] = evaluation.score
        self._log(step, values)

    def close(self, reason: str | None, patience: float = _PATIENCE) -> None:
        """Tell the trackers how the run has ended (None: they shall not know) and let them go."""
        if self._rows and reason is not None:
            self._summarise()
        until = time.monotonic() + patience
        for feed in self._feeds or ():
            feed.close(lambda tracker: tracker.close(reason), max(0.0, until - time.monotonic()))
        self._sort_out()
        self._feeds = []

    def dropped(self) -> list[str]:
        """What is to be said of trackers that were dropped since this was asked last."""
        self._sort_out()
        dropped, self._dropped = self._dropped, []
        return dropped

    def _summarise(self) -> None:
        rows, self._rows = self._rows, []
        last = rows[-1]
        values = {name: mean(row[key] for row in rows) for name, key in _MEANS.items()}
        values["train/learning_rate"] = last["learning_rate"]
        seconds = math.fsum(row["seconds"] for row in rows)
        values["train/tokens_per_second"] = math.fsum(row["tokens"] for row in rows) / (seconds or math.nan)
        exchanged = last["sent"] + last["received"]
        values["cluster/exchanged_bytes_per_step"] = (exchanged - self._exchanged) / len(rows)
        self._exchanged = exchanged
        values |= {f"faults/{kind}": float(count) for kind, count in asdict(self._faults).items() if count}
        self._log(int(last["step"]) + 1, values)

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        # A loss that is not finite is counted among the directions; a tracker's curve has no place for it.
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        now = time.time()
        self._tell(lambda tracker: tracker.log(step, finite, now))

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for feed in self._feeds or ():
            feed.put(call)

    def _sort_out(self) -> None:
        failed = [feed for feed in self._feeds or () if feed.fault is not None]
        self._dropped += [f"{feed.name} gets no more reports of this run: {feed.fault}" for feed in failed]
        self._feeds = self._feeds and [feed for feed in self._feeds if feed not in failed]


def mean(values: Iterable[float]) -> float:
    """Mean of those that are finite; NaN if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
