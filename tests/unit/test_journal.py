"""The journal: a step goes into the tables, the log and the progress, and a resumed run goes on where it was."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from actors.exporter import Exporter
from actors.journal import Journal, rms
from zoray.aggregate import ProbeResult, aggregate
from zoray.protocol import Counters, Evaluation, StepRecord
from zoray.runs import RunFolder

EVALUATION = Evaluation(2.0, 0.1, 10, 4)


def record(step: int = 0, gradients: tuple[float, ...] = (3.0, -4.0), **keys: object) -> StepRecord:
    probes = [ProbeResult(step, k, 0, g, 2.5, contrast=1.0) for k, g in enumerate(gradients)]
    decided = aggregate(
        step,
        probes,
        directions=len(gradients),
        microbatches=1,
        learning_rate=0.5,
        max_projected_gradient=3.5,
        previous=bytes(32),
    )
    whole = StepRecord(step, decided, 0.5, None, None, 2, 2, 10.0, 11.5, 12.0, 2.0, 1.0, Counters())
    return replace(whole, **keys)  # type: ignore[arg-type]


def journal_of(folder: Path) -> Journal:
    (folder / "metrics").mkdir(exist_ok=True)
    return Journal(RunFolder(folder), Exporter("r", "m", 10), 10)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = journal_of(tmp_path)
    made.begin(0, "http://here/metrics", 32.0)
    return made


def test_a_step(journal: Journal) -> None:
    journal.exchanged(sent=15)
    journal.exchanged(received=31)
    journal.report(record(0))
    (row,) = journal.folder.rows("steps")
    assert (row["step"], row["loss"], row["replicas"], row["tokens"]) == (0, 2.5, 2, 64.0)
    assert (row["sent"], row["received"]) == (15, 31)
    assert row["gradient_rms"] == pytest.approx(math.sqrt(12.5))
    assert row["gradient_noise"] == pytest.approx(1 / 12.5)
    # 2 s from opened to durable; 3 s of probes and applying on two replicas; half a second to the disk.
    assert (row["seconds"], row["probe_seconds"], row["commit_seconds"], row["wait_seconds"]) == (2.0, 1.5, 0.5, 0.0)
    progress = journal.progress
    assert (progress.step, progress.loss, progress.replicas, progress.tokens_per_second) == (1, 2.5, 2, 32.0)
    assert progress.remaining == 9 * 2.0


def test_steps_that_become_shorter_are_told_once(journal: Journal) -> None:
    for step, factor in enumerate((1.0, 1.0, 0.5, 0.5)):
        told = record(step)
        assert told.aggregate is not None
        journal.report(replace(told, aggregate=replace(told.aggregate, step_factor=factor)))
    assert [row["step_factor"] for row in journal.folder.rows("steps")] == [1.0, 1.0, 0.5, 0.5]
    (warning,) = journal.progress.warnings
    assert warning == "step 2: the loss has risen, so steps are 0.5 times as long from here on"


def test_time_is_the_mean_of_recent_steps(journal: Journal) -> None:
    journal.report(record(0))
    journal.report(record(1, durable=14.0))
    assert journal.progress.split.total == 3.0
    assert journal.progress.remaining == 8 * 3.0


def test_evaluations(journal: Journal) -> None:
    journal.report(record(0, evaluation=EVALUATION))
    journal.report(record(5, aggregate=None, evaluation=Evaluation(1.0, 0.1, 10, 9)))
    assert [(row["step"], row["loss"], row["correct"]) for row in journal.folder.rows("evaluations")] == [
        (0, 2.0, 4),
        (5, 1.0, 9),
    ]
    assert journal.progress.first == EVALUATION
    assert journal.progress.last is not None and journal.progress.last.loss == 1.0
    # The one after the last commit is no step.
    assert journal.progress.step == 1
    assert [row["step"] for row in journal.folder.rows("steps")] == [0]
    assert "step 5: held-out loss 1.0000 ± 0.1000" in journal.folder.log.read_text()


def test_digests_keep_their_zeros(journal: Journal) -> None:
    journal.report(record(3, digest=0xAB))
    assert list(journal.folder.rows("digests")) == [{"step": 3, "digest": "00000000000000ab"}]


def test_warnings_are_in_the_log_and_the_progress(journal: Journal) -> None:
    journal.say("as usual")
    journal.warn("not as usual")
    assert journal.progress.warnings == ("not as usual",)
    first, second = journal.folder.log.read_text().splitlines()
    assert "INFO" in first and "as usual" in first
    assert "WARNING" in second and "not as usual" in second


def test_a_resumed_run_knows_its_evaluations_up_to_there(tmp_path: Path, journal: Journal) -> None:
    for step, loss in ((0, 3.0), (2, 2.0), (4, 1.0)):
        journal.report(record(step, aggregate=None, evaluation=Evaluation(loss, 0.1, 10, 0)))
    again = journal_of(tmp_path)
    again.begin(3, "", 32.0)
    assert again.progress.step == 3
    assert again.progress.first is not None and again.progress.first.loss == 3.0
    assert again.progress.last is not None and again.progress.last.loss == 2.0


def test_a_second_journal_of_a_run_does_not_write_its_lines_twice(tmp_path: Path, journal: Journal) -> None:
    journal_of(tmp_path).say("once")
    assert journal.folder.log.read_text().count("once") == 1


def test_gradients_that_are_not_finite_do_not_count(journal: Journal) -> None:
    journal.report(record(0, gradients=(3.0, math.nan)))
    (row,) = journal.folder.rows("steps")
    assert (row["gradient_rms"], row["nonfinite"]) == (3.0, 1)


def test_rms() -> None:
    assert rms([3.0, -4.0]) == pytest.approx(math.sqrt(12.5))
    assert math.isnan(rms([]))


def test_the_end(journal: Journal) -> None:
    assert not journal.progress.finished
    journal.finished(81)
    assert journal.progress.finished and journal.progress.ledger_bytes == 81


def test_steps_that_are_computed_again_are_forgotten(journal: Journal) -> None:
    for step in range(6):
        journal.report(record(step, digest=step, evaluation=EVALUATION if step in (2, 4) else None))
    assert journal.progress.replica_steps == 12
    journal.rewound(3)
    assert journal.progress.step == 3
    assert [row["step"] for row in journal.folder.rows("steps")] == [0, 1, 2]
    assert [row["step"] for row in journal.folder.rows("evaluations")] == [2]
    # The digest of step 3 is that of the weights after the commits 0 to 2.
    assert [row["step"] for row in journal.folder.rows("digests")] == [0, 1, 2, 3]
