"""The journal of a run: what happened in each step, in the folder's tables, in the log, and as live progress."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass, field, replace

from actors.curve import Curve, Points
from actors.exporter import Exporter
from actors.trackers import Trackers
from zoray.protocol import Evaluation, StepRecord
from zoray.runs import RunFolder

RECENT = 50
"""Steps over which times are averaged."""


@dataclass(frozen=True, slots=True)
class Split:
    """Mean seconds of recent steps, and what they went to (per replica)."""

    total: float = 0.0
    probe: float = 0.0
    commit: float = 0.0
    wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is, for whoever watches it.

    Attributes:
        step, max_steps: committed steps, of so many.
        loss: of the last step; None before the first.
        first, last: the first and the latest evaluation.
        tokens_per_second: training tokens, of recent steps.
        split: where recent steps' time went.
        replicas: live ones.
        sent, received: bytes between the coordinator and all replicas since it started.
        remaining: seconds left, None while unknown.
        replica_steps: steps since it started, each counted once for every replica there was.
        trainable: weights that are trained; 0 while unknown.
        curve: of the training loss, from the first step on: (step, mean loss around it).
        ledger_bytes: size of the ledger, when the run is over.
        warnings: all so far.
        metrics_url: where Prometheus finds the run.
        finished: whether the run is over.
    """

    step: int
    max_steps: int
    loss: float | None = None
    first: Evaluation | None = None
    last: Evaluation | None = None
    tokens_per_second: float = 0.0
    split: Split = field(default_factory=Split)
    replicas: int = 0
    sent: int = 0
    received: int = 0
    remaining: float | None = None
    replica_steps: int = 0
    trainable: int = 0
    curve: Points = ()
    ledger_bytes: int = 0
    warnings: tuple[str, ...] = ()
    metrics_url: str = ""
    finished: bool = False


class Journal:
    """Writes down what the coordinator reports.

    Args:
        folder: of the run.
        exporter: of its metrics.
        max_steps: steps of the run.
        trackers: to be told of it too.
    """

    def __init__(self, folder: RunFolder, exporter: Exporter, max_steps: int, trackers: Trackers | None = None) -> None:
        self.folder, self.exporter, self.progress = folder, exporter, Progress(0, max_steps)
        self._trackers = trackers
        self._curve = Curve()
        self._tokens = 0.0
        self._sent = self._received = 0
        self._recent: deque[Split] = deque(maxlen=RECENT)
        self._factor = 0.0
        self._log = _file_logger(folder)

    def begin(self, step: int, metrics_url: str, tokens_per_direction: float, trainable: int = 0) -> None:
        """The run is about to start, or to continue, at a step.

        Args:
            step: the first one that is not in the ledger.
            metrics_url: where Prometheus finds the run.
            tokens_per_direction: of training data, on all of its microbatches.
            trainable: number of weights that are trained.
        """
        self.progress = replace(self.progress, step=step, metrics_url=metrics_url, trainable=trainable)
        self._tokens = tokens_per_direction
        self.exporter.begin(step)
        for row in self.folder.rows("evaluations"):
            if row["step"] <= step:
                measured = row["loss"], row["standard_error"], row["count"], row["correct"], row.get("score", 0.0)
                self._evaluated(Evaluation(*measured))
        if self.progress.last is not None:
            self.exporter.evaluated(self.progress.last)

    def say(self, text: str) -> None:
        """A line in the log."""
        self._log.info(text)

    def warn(self, text: str) -> None:
        """A warning in the log and in the progress."""
        self._log.warning(text)
        self.progress = replace(self.progress, warnings=(*self.progress.warnings, text))

    def exchanged(self, sent: int = 0, received: int = 0) -> None:
        """Count bytes between the coordinator and a replica; told with the next step, because this is done for each."""
        self._sent += sent
        self._received += received

    def _tell_exchanged(self) -> None:
        progress = self.progress
        self.exporter.exchanged(self._sent, self._received)
        self.progress = replace(progress, sent=progress.sent + self._sent, received=progress.received + self._received)
        self._sent = self._received = 0

    def finished(self, ledger_bytes: int, reason: str | None = "done") -> None:
        """The run is over, as `Finish` says; None: for this coordinator alone."""
        self._tell_exchanged()
        self.progress = replace(self.progress, finished=True, ledger_bytes=ledger_bytes)
        self.close(reason)

    def close(self, reason: str | None = None) -> None:
        """Let the trackers go, whether or not the run is over."""
        if self._trackers is not None:
            self._trackers.close(reason)
            self._hear()

    def rewound(self, step: int) -> None:
        """The steps from this one on are computed again: nothing recorded of them is true."""
        for table in ("steps", "evaluations", "digests"):
            # An evaluation and a digest at this step are of weights that stay.
            self.folder.forget(table, step - 1 if table == "steps" else step)
        self._curve = Curve.of((int(row["step"]), row["loss"]) for row in self.folder.rows("steps"))
        self.progress = replace(self.progress, step=step, curve=self._curve.points)
        self.exporter.begin(step)
        if self._trackers is not None:
            self._trackers.begin(step)

    def report(self, record: StepRecord) -> None:
        """A step is committed, or the last evaluation is in."""
        if record.evaluation is not None:
            self._evaluated(record.evaluation)
            self.folder.append("evaluations", _evaluation_row(record.step, record.evaluation))
            self.exporter.evaluated(record.evaluation)
            if self._trackers is not None:
                self._trackers.evaluation(record.step, record.evaluation)
            loss, error = record.evaluation.loss, record.evaluation.standard_error
            self._log.info("step %d: held-out loss %.4f ± %.4f", record.step, loss, error)
        if record.digest is not None:
            self.digest(record.step, record.digest)
        if record.aggregate is not None:
            self._committed(record)
        self._hear()

    def digest(self, step: int, digest: int) -> None:
        """The replicas agree on the digest of the weights at a step."""
        self.folder.append("digests", {"step": step, "digest": f"{digest:016x}"})
        self._log.info("step %d: digest %016x", step, digest)

    def _hear(self) -> None:
        """Say which trackers have failed."""
        for text in self._trackers.dropped() if self._trackers is not None else ():
            self.warn(text)

    def _evaluated(self, evaluation: Evaluation) -> None:
        self.progress = replace(self.progress, first=self.progress.first or evaluation, last=evaluation)

    def _committed(self, record: StepRecord) -> None:
        total = record.durable - record.opened
        probe = (record.probe_seconds + record.apply_seconds) / max(record.processes, 1)
        commit = record.durable - record.decided
        split = Split(total, probe, commit, max(0.0, total - probe - commit))
        self._recent.append(split)
        self._tell_exchanged()
        assert record.aggregate is not None
        if (factor := record.aggregate.step_factor) < self._factor:
            self.warn(f"step {record.step}: the loss has risen, so steps are {factor:g} times as long from here on")
        self._factor = factor
        mean = Split(*(math.fsum(getattr(s, n) for s in self._recent) / len(self._recent) for n in Split.__slots__))
        row = self._step_row(record, split)
        self.folder.append("steps", row)
        self.exporter.committed(record, split, row["tokens"], 2 * self.progress.trainable)
        if self._trackers is not None:
            self._trackers.step(row, record.counters)
        self._curve.add(record.step, row["loss"])
        left = self.progress.max_steps - record.step - 1
        self.progress = replace(
            self.progress,
            step=record.step + 1,
            loss=row["loss"],
            tokens_per_second=row["tokens"] / mean.total if mean.total else 0.0,
            split=mean,
            replicas=record.replicas,
            replica_steps=self.progress.replica_steps + record.replicas,
            curve=self._curve.points,
            remaining=left * mean.total,
        )

    def _step_row(self, record: StepRecord, split: Split) -> dict[str, float]:
        assert record.aggregate is not None
        finite = [g for g in record.aggregate.projected_gradients if math.isfinite(g)]
        return {
            "step": record.step,
            "loss": record.aggregate.commit.loss,
            "learning_rate": record.learning_rate,
            "gradient_rms": rms(finite),
            "gradient_noise": record.aggregate.disagreement,
            "step_factor": record.aggregate.step_factor,
            "nonfinite": record.aggregate.nonfinite,
            "clipped": record.aggregate.clipped,
            "directions": len(record.aggregate.projected_gradients),
            "replicas": record.replicas,
            "seconds": round(split.total, 6),
            "probe_seconds": round(split.probe, 6),
            "commit_seconds": round(split.commit, 6),
            "wait_seconds": round(split.wait, 6),
            "tokens": self._tokens * len(record.aggregate.projected_gradients),
            "sent": self.progress.sent,
            "received": self.progress.received,
            "time": round(time.time(), 3),
        }


def rms(values: list[float]) -> float:
    """Root mean square; NaN of nothing."""
    return math.sqrt(math.fsum(v * v for v in values) / len(values)) if values else math.nan


def _evaluation_row(step: int, evaluation: Evaluation) -> dict[str, float]:
    return {
        "step": step,
        "loss": evaluation.loss,
        "standard_error": evaluation.standard_error,
        "count": evaluation.count,
        "correct": evaluation.correct,
        "score": evaluation.score,
    }


def _file_logger(folder: RunFolder) -> logging.Logger:
    logger = logging.getLogger(f"zoray.run.{folder.name}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.FileHandler(folder.log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    logger.addHandler(handler)
    return logger
