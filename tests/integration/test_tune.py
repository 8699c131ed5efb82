"""`zoray tune` on a real Ray: replicas, their deaths and interruptions do not change one byte of any trial."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.tuning import Tuner
from actors.tuning_pool import TrialFleet
from actors.tuning_replica import Entry, Order, TrialReplica
from tests.conftest import make_model
from tests.integration.conftest import Inputs, Launch
from zoray.config import RunConfig
from zoray.errors import DataError, RunError
from zoray.tuning import Assign, Finish, Phase, Standing, Study, Trial, grid, make_plan, stand
from zoray.tuning.folder import StudyFolder
from zoray.tuning.messages import Value

PLAN = make_plan(grid(1e-2, 1e-3, [3e-3, 1e-2, 3e-2, 3.0], [1e-3]), 6, 2, 2)


class WarmTrial:
    """A process that is a replica of one study after the other."""

    def become(self, name: str, config: RunConfig, snapshots: str) -> None:
        self.actor = TrialReplica(name, config, snapshots)

    def enter(self, epsilons: tuple[float, ...]) -> Entry:
        return self.actor.enter(epsilons)

    def share(self, order: Order) -> tuple[Value, ...]:
        return self.actor.share(order)


class WarmTrialFleet(TrialFleet):
    """A fleet whose replicas give their process back instead of ending it, but for those that were killed."""

    idle: list[Any]
    killed: list[Any]

    def _create(self, name: str, rank: int, node: str) -> Any:
        import ray

        remote: Any = ray.remote(WarmTrial)
        actor = self.idle.pop() if self.idle else remote.options(num_cpus=0, max_concurrency=1).remote()
        actor.become.remote(name, self.config, self._snapshots)
        return actor

    def _kill(self, actor: Any) -> None:
        if actor not in self.killed:
            self.idle.append(actor)


@pytest.fixture(scope="module")
def idle(local_ray: None) -> Iterator[list[Any]]:
    import ray

    found: list[Any] = []
    yield found
    for actor in found:
        ray.kill(actor)


@dataclass(frozen=True)
class Tuned:
    """A study that ended, or was stopped."""

    folder: StudyFolder
    finish: Finish
    study: Study
    said: list[str]
    notes: list[dict[str, Any]]

    @property
    def ledgers(self) -> dict[str, bytes]:
        return {
            each.name: (each / "ledger" / "commits.bin").read_bytes()
            for each in (self.folder.path / "trials").iterdir()
        }

    @property
    def standing(self) -> Standing:
        return stand(self.study)


class Hunted(Tuner):
    """A study to which something happens when work is given out."""

    at: Callable[[Any, Assign], None] | None = None

    def _carry_out(self, action: Any) -> None:
        super()._carry_out(action)
        if isinstance(action, Assign) and self.at is not None:
            self.at(self, action)


Tune = Callable[..., Tuned]


@pytest.fixture
def tune(idle: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tune:
    """`tune(config, plan, folder=None, at=None)`: a study to its end; `at(tuner, assign)` is called at every share."""
    monkeypatch.setattr(WarmTrialFleet, "idle", idle, raising=False)
    monkeypatch.setattr(WarmTrialFleet, "killed", [], raising=False)
    monkeypatch.setattr("actors.tuning_pool.TrialFleet", WarmTrialFleet)

    def run(config: RunConfig, plan: Any = PLAN, folder: StudyFolder | None = None, at: Any = None) -> Tuned:
        place = folder or StudyFolder(tmp_path / f"study-{len(list(tmp_path.iterdir()))}")
        place.prepare(config, plan)
        said: list[str] = []
        notes: list[dict[str, Any]] = []
        tuner = Hunted(config, plan, place, False, say=said.append, noted=lambda row: notes.append(dict(row)))
        tuner.at = at
        finish = tuner.run(lambda study: None)
        assert tuner.study is not None
        return Tuned(place, finish, tuner.study, said, notes)

    return run


@pytest.fixture(scope="module")
def undisturbed(idle: list[Any], inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """One replica, nothing happens."""
    with pytest.MonkeyPatch.context() as patch:
        made = tune.__wrapped__(idle, tmp_path_factory.mktemp("undisturbed"), patch)  # type: ignore[attr-defined]
        found: Tuned = made(inputs.config(replicas=1))
    return found


def test_a_study(undisturbed: Tuned) -> None:
    assert undisturbed.finish.reason == "done"
    standing = undisturbed.standing
    assert standing.trial is not None and standing.trial.learning_rate in (1e-2, 3e-2) and standing.improves
    wild = undisturbed.study.races["lr3-eps0.001"]
    assert wild.phase is Phase.DIVERGED and wild.step < 6
    # Known from the start of each trial's folder, and not only to whoever ran it.
    assert undisturbed.folder.finished(undisturbed.folder.trial("lr3-eps0.001").config(), PLAN) is not None
    kinds = [row["event"] for row in undisturbed.folder.rows()]
    assert kinds[:3] == ["plan", "judged", "evaluated"] and "cut" in kinds and "diverged" in kinds


def test_three_replicas_do_the_same(undisturbed: Tuned, tune: Tune, inputs: Inputs) -> None:
    many = tune(inputs.config(replicas=3))
    assert many.ledgers == undisturbed.ledgers
    assert many.folder.evaluations() == undisturbed.folder.evaluations()
    assert many.standing == undisturbed.standing


def test_a_trial_is_the_beginning_of_its_run_and_goes_on_as_one(
    undisturbed: Tuned, tune: Tune, inputs: Inputs, launch: Launch, warm: None, tmp_path: Path
) -> None:
    best = undisturbed.standing.trial
    assert best is not None
    whole = launch(inputs.config(learning_rate=best.learning_rate, epsilon=best.epsilon, max_steps=9, replicas=1))
    assert whole.ledger.startswith(undisturbed.ledgers[best.name])
    folder = StudyFolder(Path(shutil.copytree(undisturbed.folder.path, tmp_path / "copy")))
    run = folder.trial(best.name)
    resumed = launch(run.config(["max_steps=9", "replicas=1"]), run)
    assert resumed.ledger == whole.ledger and resumed.finish.digest == whole.finish.digest
    # What it has done beyond the study is no harm to that.
    again = tune(inputs.config(replicas=1), folder=folder).standing
    assert [(race.name, race.phase, race.evaluations) for race in again.races] == [
        (race.name, race.phase, race.evaluations) for race in undisturbed.standing.races
    ]


@pytest.mark.parametrize(("trial", "step", "evaluating"), [("lr0.01-eps0.001", 2, False), ("lr0.01-eps0.001", 6, True)])
def test_a_replica_is_killed(
    trial: str, step: int, evaluating: bool, undisturbed: Tuned, tune: Tune, inputs: Inputs
) -> None:
    import ray

    killed: list[str] = []

    def kill(tuner: Tuner, assign: Assign) -> None:
        share = assign.share
        if not killed and (share.trial, share.step, share.evaluating) == (trial, step, evaluating):
            killed.append(assign.replica)
            (actor,) = tuner.pool.fleet._actors[assign.replica]
            WarmTrialFleet.killed.append(actor)
            ray.kill(actor)

    found = tune(inputs.config(replicas=2), at=kill)
    assert len(killed) == 1 and any(f"replica {killed[0]} has gone" in text for text in found.said)
    assert found.ledgers == undisturbed.ledgers and found.standing == undisturbed.standing


def test_a_study_that_was_stopped_goes_on(undisturbed: Tuned, tune: Tune, inputs: Inputs) -> None:
    def stop(tuner: Tuner, assign: Assign) -> None:
        if (assign.share.trial, assign.share.step) == ("lr0.01-eps0.001", 1):
            tuner.stop()

    first = tune(inputs.config(replicas=2), at=stop)
    assert first.finish.reason == "stopped"
    assert any(len(ledger) < len(undisturbed.ledgers[name]) for name, ledger in first.ledgers.items())
    # And in the second rung, with a last record that a crash has torn.
    path = first.folder.trial("lr0.01-eps0.001").ledger / "commits.bin"
    path.write_bytes(path.read_bytes()[:-5])

    def stop_later(tuner: Tuner, assign: Assign) -> None:
        if assign.share.step == 4:
            tuner.stop()

    second = tune(inputs.config(replicas=1), folder=first.folder, at=stop_later)
    assert second.finish.reason == "stopped" and any("lr0.01" in text for text in second.said)
    third = tune(inputs.config(replicas=2), folder=first.folder)
    assert third.finish.reason == "done"
    assert third.ledgers == undisturbed.ledgers and third.standing == undisturbed.standing
    assert first.folder.evaluations() == undisturbed.folder.evaluations()


def test_without_held_out_data(tune: Tune, inputs: Inputs) -> None:
    task = {key: value for key, value in inputs.base["task"].items() if key != "eval"}
    plan = make_plan((Trial(1e-2, 1e-3), Trial(3e-2, 1e-3)), 2, 1, 3)
    found = tune(inputs.config(task=task, eval_steps=None, replicas=2, max_eval_samples=8), plan)
    judged = found.folder.judged()
    assert judged is not None and (judged.source, judged.examples, judged.fresh) == ("train", 8, True)
    longer = make_plan(plan.trials, 40, 1, 3)
    seen = tune(inputs.config(task=task, eval_steps=None, replicas=2, max_steps=40, max_eval_samples=8), longer)
    judged = seen.folder.judged()
    assert judged is not None and not judged.fresh


def test_a_classification_with_lora(tune: Tune, inputs: Inputs) -> None:
    model = make_model("bert", inputs.folder)
    task = {**inputs.base["task"], "kind": "classification"}
    lora = {"lora": {"r": 2, "target_modules": ["query"]}}
    plan = make_plan((Trial(1e-1, 1e-3), Trial(1e-1, 1e-2)), 2, 1, 3)
    found = tune(inputs.config(model=str(model), task=task, trainable=lora, replicas=2), plan)
    assert all(race.evaluations[0].count == 10 for race in found.standing.races)


def test_a_fault_of_the_data_is_the_users_and_not_rays(tune: Tune, inputs: Inputs) -> None:
    task = {**inputs.base["task"], "text_column": "words"}
    with pytest.raises(DataError, match="words"):
        tune(inputs.config(task=task, replicas=1))


def test_two_cannot_write_one_study(undisturbed: Tuned, tune: Tune, inputs: Inputs) -> None:
    from actors.lock import RunLock

    with RunLock(undisturbed.folder.path), pytest.raises(RunError, match="being written by process"):
        tune(inputs.config(replicas=1), folder=undisturbed.folder)


def test_the_command_is_stopped_and_repeated(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    keys = {**inputs.base, "max_steps": 40, "learning_rate": 1e-2, "replicas": 2, "output_dir": "runs"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys))
    command = [sys.executable, "-m", "launch.cli", "tune", "run.yaml", "--learning-rates", "1e-3,1e-2,2e-2,1.0"]
    command += ["--epsilons", "1e-3", "--steps", "9", "--write", "best.yaml"]
    first = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert first.stdout is not None
    lines = []
    for line in first.stdout:
        lines.append(line)
        if line.startswith("rung 1"):
            os.killpg(first.pid, signal.SIGINT)
            break
    lines.append(first.communicate(timeout=120)[0])
    assert first.returncode == 130, "".join(lines)
    assert "the same command continues" in "".join(lines) and "Traceback" not in "".join(lines)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "study run-tune, continued" in done.stdout and "learning_rate: 0.0" in done.stdout
    best = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert (
        best["learning_rate"] in (1e-2, 2e-2) and (tmp_path / "runs" / "run-tune" / "plot.png").stat().st_size > 10_000
    )
    # It is over: no replica is started to say so again.
    shown = subprocess.run([*command[:-2], "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert shown.returncode == 0 and json.loads(shown.stdout)["best"] == plan_best(best)


def plan_best(best: dict[str, Any]) -> str:
    return Trial(best["learning_rate"], best["epsilon"]).name
