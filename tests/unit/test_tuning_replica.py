"""A replica of a study: it goes from trial to trial and back, and computes what a run's replica would."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from actors.tuning_replica import JUDGED, Order, TrialReplica
from tests.conftest import SENTENCES, TinyModel
from zoray.aggregate import ProbeResult
from zoray.commits import Commit
from zoray.config import RunConfig
from zoray.errors import LedgerError, RunError
from zoray.probe import Prober
from zoray.tasks.sampler import sample_ids
from zoray.tuning import BASE, Evaluated, Share, Trial
from zoray.tuning.deciding import rules_of

GENESIS = bytes(32)
ONE, OTHER = Trial(1e-2, 1e-3), Trial(1e-2, 1e-2)


@pytest.fixture
def config(tiny_model: TinyModel, tmp_path: Path) -> RunConfig:
    rows = [{"text": " ".join(SENTENCES[(i * j) % 7] for j in range(4))} for i in range(60)]
    for name, part in (("train", rows[:30]), ("eval", rows[30:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    task = {"kind": "causal_lm", "train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
    return RunConfig.model_validate(
        {
            "model": str(tiny_model("gpt2", tmp_path)),
            "task": {**task, "max_length": 16},
            "max_steps": 10,
            "directions": 2,
            "microbatches": 2,
            "per_direction_batch_size": 2,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-6,
            "optimizer": {"normalize": "none"},
        }
    )


def entered(config: RunConfig) -> TrialReplica:
    replica = TrialReplica("r0", config, "")
    replica.enter((1e-3, 1e-2))
    return replica


def run(
    replica: TrialReplica, config: RunConfig, trial: Trial, commits: list[Commit], fresh: bool
) -> list[ProbeResult]:
    """One more step of a trial; its commit is added to the others."""
    records = b"".join(commit.encode() for commit in (commits if fresh else commits[-1:]))
    share = Share(trial.name, len(commits), False, (0, 1, 2, 3))
    values = replica.share(Order(share, trial.epsilon, GENESIS if fresh else None, records))
    results = [value for value in values if isinstance(value, ProbeResult)]
    previous = commits[-1].hash if commits else GENESIS
    rules = rules_of(config, 1)
    known = reduce(rules.after, commits, rules.initial)
    commits.append(rules.decide(trial, share.step, results, previous, known).commit)
    return results


REMEMBERS = {"optimizer": {"normalize": "curvature", "momentum": 0.5}}


@pytest.mark.parametrize("keys", [{}, REMEMBERS], ids=["sgd", "remembers"])
def test_going_from_trial_to_trial_changes_nothing(config: RunConfig, keys: dict[str, Any]) -> None:
    config = RunConfig.model_validate({**config.model_dump(), **keys})
    apart: dict[Trial, list[Commit]] = {ONE: [], OTHER: []}
    for trial, commits in apart.items():
        replica = entered(config)
        for step in range(4):
            run(replica, config, trial, commits, fresh=step == 0)
    mixed: dict[Trial, list[Commit]] = {ONE: [], OTHER: []}
    replica = entered(config)
    for trial in (ONE, OTHER, OTHER, ONE, ONE, ONE, OTHER, OTHER):
        run(replica, config, trial, mixed[trial], fresh=True)
    assert mixed == apart and apart[ONE] != apart[OTHER]
    assert all(bool(commit.notes) == bool(keys) for commits in apart.values() for commit in commits)


def test_the_parts_of_a_step_are_those_of_a_run(config: RunConfig) -> None:
    results = run(entered(config), config, ONE, [], fresh=True)
    assert [(result.direction, result.microbatch) for result in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({result.projected_gradient for result in results}) == 4


def test_the_loss_at_the_weights_is_computed_once_a_batch(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"estimator": "one_sided", "directions": 4, "directions_per_batch": 2}
    config = RunConfig.model_validate({**config.model_dump(), **keys})
    replica, centres = entered(config), []
    plain = Prober.side

    def counted(self: Prober, step: int, direction: int, batch: Any, epsilon: float, sign: Any) -> float:
        if sign == 0:
            centres.append(batch)
        return plain(self, step, direction, batch, epsilon, sign)

    monkeypatch.setattr(Prober, "side", counted)
    share = Share(ONE.name, 0, False, tuple(range(8)))
    values = replica.share(Order(share, ONE.epsilon, GENESIS, b""))
    assert [(v.direction, v.microbatch) for v in values] == [(k, m) for k in range(4) for m in range(2)]  # type: ignore[union-attr]
    assert len(centres) == 4


def judged(config: RunConfig, **keys: Any) -> tuple[TrialReplica, Evaluated]:
    config = RunConfig.model_validate({**config.model_dump(), **keys})
    replica = TrialReplica("r0", config, "")
    entry = replica.enter((1e-3,))
    share = Share(BASE, 0, True, tuple(range(entry.shards)))
    values = [value for value in replica.share(Order(share, 1e-3, None, b"")) if isinstance(value, Evaluated)]
    losses = tuple(loss for value in values for loss in value.losses)
    assert len(losses) == entry.judged
    return replica, Evaluated(losses)


def test_all_held_out_examples_where_they_are_few(config: RunConfig) -> None:
    replica, found = judged(config)
    rows = [replica.replica.evaluate(replica.task.eval_batch(i)) for i in range(replica.task.eval_shards)]
    sums = [row.summary() for row in rows]
    assert found.loss == pytest.approx(sum(each[0] for each in sums) / sum(each[2] for each in sums), rel=1e-12)
    assert found.count == replica.task.eval_size < JUDGED


def test_batches_from_all_over_the_data_where_they_are_many(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.tuning_replica.JUDGED", 12)
    replica, found = judged(config)
    assert found.count == 12 and replica.task.eval_shards > 10
    starts = [batch[0] for batch in replica._batches]
    assert starts[0] == 0 and starts[-1] > replica.task.eval_size / 2
    first, _ = judged(config, max_eval_samples=8)
    assert [batch[0] for batch in first._batches] == [0, 4]


def test_training_examples_where_there_are_no_others(config: RunConfig) -> None:
    task = {**config.task.model_dump(), "eval": None}
    replica, found = judged(config, task=task, max_eval_samples=6)
    assert found.count == 6
    sizes = {"directions": 2, "microbatches": 2, "batch_size": 2}
    probes = [(step, k, m) for step in range(3) for k in range(2) for m in range(2)]
    seen = {int(i) for probe in probes for i in sample_ids(0, replica.task.train_size, *probe, **sizes)}
    # No run of so few steps trains on them.
    assert len(seen) == 24 and seen.isdisjoint(i for batch in replica._batches for i in batch)
    _, all_of_them = judged(config, task=task)
    assert all_of_them.count == replica.task.train_size


def test_a_gap_and_a_foreign_commit_are_refused(config: RunConfig) -> None:
    replica, commits = entered(config), list[Commit]()
    for step in range(3):
        run(replica, config, ONE, commits, fresh=step == 0)
    share = Share(ONE.name, 3, False, (0,))
    with pytest.raises(RunError, match="asked for"):
        replica.share(Order(share, ONE.epsilon, GENESIS, commits[0].encode()))
    with pytest.raises(LedgerError):
        replica.share(Order(share, ONE.epsilon, bytes([1] * 32), b"".join(commit.encode() for commit in commits)))
