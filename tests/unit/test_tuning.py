"""The pure parts of `zoray tune`: grids and rungs, comparisons, what a study decides, and its folder."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launch.tune import Search, plan_of
from launch.tune_words import conclusion, facts, table
from tests.simulation.tuning import GENESIS, RULES
from zoray.commits import seal
from zoray.config import RunConfig, dump, load
from zoray.errors import ConfigError, NumericsError, RunError, ZorayError
from zoray.tuning import (
    BASE,
    Evaluated,
    Note,
    Phase,
    Plan,
    Study,
    Trial,
    begin,
    cost,
    grid,
    longest_within,
    make_plan,
    stand,
)
from zoray.tuning.deciding import passes_per_step
from zoray.tuning.folder import Judged, StudyFolder
from zoray.tuning.grid import kept

CONFIG = RunConfig.model_validate(
    {"model": "m", "task": {"kind": "causal_lm", "train": "t"}, "max_steps": 300, "learning_rate": 1e-5}
)


def test_the_default_plan() -> None:
    plan = plan_of(CONFIG, Search())
    assert len(plan.trials) == 12 and plan.rungs == (4, 10, 30) and [plan.entering(i) for i in range(3)] == [12, 4, 2]
    assert Trial(1e-5, 1e-3) in plan.trials, "the configuration as it is must be among them"
    assert {trial.learning_rate for trial in plan.trials} == {3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4}
    # The curvature, which is measured by default, drowns in rounding where epsilon is small.
    assert {trial.epsilon for trial in plan.trials} == {1e-3, 1e-2}
    plain = RunConfig.model_validate({**CONFIG.model_dump(), "optimizer": {"normalize": "none"}})
    assert {trial.epsilon for trial in plan_of(plain, Search()).trials} == {1e-4, 1e-3}
    short = plan_of(plain.model_copy(update={"dtype": "bfloat16"}), Search())
    assert {trial.epsilon for trial in short.trials} == {1e-3, 1e-2}


@pytest.mark.parametrize(
    ("estimator", "shared", "passes"),
    [("spsa", 1, 42), ("spsa", 3, 42), ("one_sided", 3, 21 + 9), ("one_sided", 9, 21 + 3), ("backprop", 3, 3 * 9)],
)
def test_passes_are_counted_by_direction_and_by_batch(estimator: str, shared: int, passes: int) -> None:
    keys = {"estimator": estimator, "directions_per_batch": shared, "directions": 7, "microbatches": 3}
    optimizer = {"optimizer": {"normalize": "none"}}
    assert passes_per_step(RunConfig.model_validate({**CONFIG.model_dump(), **keys, **optimizer})) == passes


@given(st.integers(2, 40), st.integers(1, 4), st.integers(2, 5), st.integers(1, 100_000))
def test_a_budget_is_kept_and_used(trials: int, rungs: int, eta: int, budget: int) -> None:
    longest = longest_within(budget, trials, rungs, eta)

    def steps(last: int) -> int:
        return cost(trials, [-(-last // eta**i) for i in reversed(range(rungs))], eta)

    assert steps(longest) <= budget < steps(longest + 1)


@given(st.integers(1, 1000), st.integers(2, 9), st.integers(0, 9))
def test_some_are_always_kept(trials: int, eta: int, times: int) -> None:
    assert 1 <= kept(trials, eta, times) <= trials
    assert kept(trials, eta, times) >= trials / eta**times


def test_names_are_folders() -> None:
    assert Trial(3e-6, 1e-3).name == "lr3e-06-eps0.001"
    assert "+" not in Trial(1e20, 1e-3).name


@pytest.mark.parametrize(
    ("search", "what", "where"),
    [
        (Search(learning_rates="1e-6"), None, None),
        (Search(learning_rates="1e-6", epsilons="1e-3"), "nothing to choose", "--learning-rates"),
        (Search(learning_rates="a,b"), "not numbers", "--learning-rates"),
        (Search(learning_rates="1e-6,-1"), "not a positive", "--learning-rates"),
        (Search(learning_rates="1e-6,1e-6"), "given twice", "--learning-rates"),
        (Search(epsilons="0"), "not a positive", "--epsilons"),
        (Search(steps=10, budget=100), "both given", "--budget"),
        (Search(steps=301), "the run has 300", "--steps"),
        (Search(budget=10**9), "the run has 300", "--budget"),
        (Search(steps=2), "too few", "--steps"),
        (Search(budget=1), "too few", "--steps"),
        (Search(rungs=5), "down to one", "--rungs"),
    ],
)
def test_bad_searches_are_told(search: Search, what: str | None, where: str | None) -> None:
    if what is None:
        assert len(plan_of(CONFIG, search).trials) == 2
        return
    with pytest.raises(ConfigError, match=what) as caught:
        plan_of(CONFIG, search)
    assert caught.value.where == where and caught.value.advice


def test_a_rate_of_zero_has_no_grid() -> None:
    with pytest.raises(ConfigError, match="learning_rate is 0"):
        grid(0.0, 1e-3)


losses = st.lists(st.floats(0.0, 10.0), min_size=2, max_size=20)


@given(losses, st.floats(0.001, 5.0))
def test_a_shift_of_all_examples_is_told_however_they_spread(values: list[float], shift: float) -> None:
    one, two = Evaluated(tuple(values)), Evaluated(tuple(value + shift for value in values))
    assert two.told_from(one) and one.told_from(two)
    assert two.above(one)[0] == pytest.approx(shift)


@given(losses)
def test_equal_ones_are_not_told_apart(values: list[float]) -> None:
    assert not Evaluated(tuple(values)).told_from(Evaluated(tuple(values)))


def test_evaluations_as_statistics_has_them() -> None:
    found = Evaluated((1.0, 2.0, 3.0, 6.0), correct=3)
    assert found.loss == 3.0 and found.accuracy == 0.75
    assert found.standard_error == pytest.approx(math.sqrt(14 / 3) / 2)
    # Differences of -1, 1, 1, -1: none on average, whatever it is that each example adds.
    assert not found.told_from(Evaluated((2.0, 1.0, 2.0, 7.0)))
    assert math.isnan(Evaluated((1.0, math.nan)).loss) and math.isnan(Evaluated((1.0,)).standard_error)


PLAN = make_plan((Trial(1e-4, 1e-3), Trial(1e-3, 1e-3), Trial(1e-2, 1e-3), Trial(1e-1, 1e-3)), 4, 2, 2)
START = Evaluated((3.0, 3.1, 2.9))


def shifted(by: float) -> Evaluated:
    return Evaluated(tuple(loss + by + 0.001 * i for i, loss in enumerate(START.losses)))


def studied(*rungs: dict[str, float], plan: Plan = PLAN, start: Evaluated = START) -> Study:
    """A study in which trials were evaluated so far from the start, rung by rung."""
    evaluations = {BASE: [start]}
    for rung in rungs:
        for name, by in rung.items():
            evaluations.setdefault(name, []).append(shifted(by))
    steps = {trial.name: plan.rungs[len(evaluations.get(trial.name, [0])) - 1] for trial in plan.trials}
    ledgers = {name: (GENESIS, [seal(i, 0.5, 1.0, 3.0, [], GENESIS) for i in range(n)]) for name, n in steps.items()}
    return begin(plan, RULES, ledgers, evaluations)


A, B, C, D = (trial.name for trial in PLAN.trials)


def test_the_best_are_kept() -> None:
    study = studied({A: -0.1, B: -0.2, C: -0.3, D: -0.05})
    assert study.rung == 1 and [race.name for race in study.running()] == [B, C]
    assert study.races[A].phase is Phase.CUT and "place 3 of 4" in study.races[A].why


def test_worse_than_the_model_as_it_is_is_out_and_those_cut_come_back() -> None:
    """What is fastest at first and diverges later must not have the last rung to itself."""
    first = {A: -0.1, B: -0.2, C: -0.3, D: 0.5}
    study = studied(first, {B: -0.4, C: 0.4})
    assert study.races[D].phase is Phase.DIVERGED and "above the 3" in study.races[D].why
    assert study.races[C].phase is Phase.DIVERGED and study.finish is None
    assert [race.name for race in study.running()] == [A, B] and study.rung == 1
    done = studied(first, {B: -0.4, C: 0.4, A: -0.5})
    assert done.finish is not None and done.finish.reason == "done"
    standing = stand(done)
    assert standing.trial is not None and standing.trial.name == A and standing.improves
    assert [race.name for race in standing.races][:2] == [A, B] and standing.edges == ("learning_rate",)


def test_a_trial_that_has_learnt_is_before_one_that_came_further_and_has_not() -> None:
    study = studied({A: -0.1, B: -0.2, C: -0.3, D: -0.05}, {B: 0.0, C: -0.0001})
    standing = stand(study)
    assert standing.trial is not None and standing.trial.name == A and standing.improves


def test_nothing_learnt_is_no_improvement() -> None:
    study = studied(*({A: 0.0, B: 0.0, C: 0.0, D: 0.0},) * 1)
    standing = stand(study)
    assert standing.winner is not None and not standing.improves
    assert len(standing.undecided) == 3


def test_equal_trials_are_ranked_by_the_smaller_rate() -> None:
    assert [race.name for race in studied({A: -0.1, B: -0.1, C: -0.1, D: -0.1}).running()] == [A, B]


def test_a_model_without_a_finite_loss_ends_it_at_once() -> None:
    study = studied(start=Evaluated((3.0, math.nan, 2.0)))
    assert study.finish is not None and study.finish.reason == "diverged"


def test_a_folder_is_continued_only_by_the_same_search(tmp_path: Path) -> None:
    folder, config = StudyFolder(tmp_path / "s"), CONFIG
    plan = plan_of(config, Search())
    assert not folder.prepare(config, plan_of(config, Search(steps=60)))
    # One that has not begun is no obstacle.
    assert not folder.prepare(config, plan)
    folder.judge(Judged("eval", 10, 2, True))
    assert folder.prepare(config, plan)
    assert folder.prepare(config.model_copy(update={"replicas": 7, "learning_rate": 1.0}), plan)
    with pytest.raises(RunError, match="another seed: 0, not 1"):
        folder.prepare(config.model_copy(update={"seed": 1}), plan)
    with pytest.raises(RunError, match="another rungs"):
        folder.prepare(config, plan_of(config, Search(steps=60)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(RunError, match="no study"):
        StudyFolder(tmp_path / "other").prepare(config, plan)


def test_evaluations_are_read_back_exactly_after_a_torn_line(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "s")
    folder.prepare(CONFIG, plan_of(CONFIG, Search()))
    found = Evaluated((0.1 + 0.2, 1e-17, math.pi), 2)
    folder.note(Note("evaluated", "a", 0, 4, found))
    with folder.events.open("ab") as file:
        file.write(b'{"event": "evaluated", "trial": "a", "ru')
    folder.note(Note("evaluated", "a", 1, 8, START))
    assert folder.evaluations() == {"a": [found, START]}


def test_other_data_cannot_judge(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "s")
    folder.prepare(CONFIG, plan_of(CONFIG, Search()))
    folder.judge(Judged("eval", 10, 2, True))
    folder.judge(Judged("eval", 10, 2, True))
    with pytest.raises(RunError, match="10 examples"):
        folder.judge(Judged("eval", 11, 2, True))


def test_a_trial_is_a_run_of_its_own(tmp_path: Path) -> None:
    folder, trial = StudyFolder(tmp_path / "s"), Trial(3e-5, 1e-4)
    folder.make_trial(CONFIG, trial, {"mathematics": {}}).close()
    config = folder.trial(trial.name).config()
    assert (config.learning_rate, config.epsilon, config.max_steps) == (3e-5, 1e-4, 300)
    assert folder.has(trial) and config.run_name == trial.name


def drawn(tmp_path: Path) -> tuple[StudyFolder, Study]:
    """A study that is over, with ledgers of its trials."""
    from tests.simulation.tuning import Carrier, World

    carrier, folder = Carrier(PLAN, World(wild=5e-2)), StudyFolder(tmp_path / "s")
    study = carrier.run(2)
    folder.prepare(CONFIG, PLAN)
    folder.judge(Judged("eval", 6, 2, True))
    for trial in PLAN.trials:
        commits = iter(carrier.ledgers[trial.name])
        with folder.make_trial(CONFIG, trial, {}) as ledger:
            for commit in commits:
                ledger.append(seal(commit.step, commit.eta, commit.decay, commit.loss, commit.terms, ledger.head))
    return folder, study


def test_the_table_and_the_conclusion(tmp_path: Path) -> None:
    folder, study = drawn(tmp_path)
    standing, console = stand(study), Console(width=160, record=True)
    console.print(table(standing, study))
    text = console.export_text()
    assert [line.split()[0] for line in text.splitlines()[1:]] == [*(race.name for race in standing.races), "base"]
    assert "best" in text and "diverged: " in text and "cut: place" in text and "accuracy" not in text
    said = "\n".join(conclusion(standing, study, folder))
    assert "learning_rate: 0.0001\nepsilon: 0.001" in said
    assert "the smallest that was tried" in said and "--learning-rates 3e-06,1e-05,3e-05,0.0001" in said
    assert f"zoray resume {folder.trial(A).path}" in said
    found = json.loads(json.dumps(facts(standing, study, folder)))
    assert found["best"] == A and found["improves"] and len(found["trials"]) == 4


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.tune_plot import draw

    folder, study = drawn(tmp_path)
    draw(study, folder, 32)
    assert folder.plot.read_bytes().startswith(b"\x89PNG") and folder.plot.stat().st_size > 20_000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="matplotlib") as caught:
        draw(study, folder, 32)
    assert "zoray[plot]" in str(caught.value.advice)


def test_without_matplotlib_there_is_still_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch import tune

    folder, study = drawn(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    tune._conclude(study, folder, CONFIG, Console(width=160), tmp_path / "best.yaml", False)
    text = capsys.readouterr().out
    assert "no picture: Drawing needs matplotlib. pip install 'zoray[plot]'" in text and f"{A} " in text
    best = load(tmp_path / "best.yaml", [])
    assert (best.learning_rate, best.epsilon, best.seed) == (1e-4, 1e-3, CONFIG.seed)


@pytest.mark.parametrize(
    ("study", "kind", "status"),
    [
        (studied({A: 0.5, B: 0.5, C: 0.5, D: 0.5}), NumericsError, 8),
        (studied(start=Evaluated((math.nan, 1.0))), NumericsError, 8),
        (studied({A: 0.0, B: 0.0, C: 0.0, D: 0.0}, {A: 0.0, B: 0.0}), ZorayError, 1),
    ],
)
def test_the_exit_status_means_something(study: Study, kind: type[ZorayError], status: int, tmp_path: Path) -> None:
    from launch import tune

    folder = StudyFolder(tmp_path / "s")
    folder.prepare(CONFIG, PLAN)
    folder.judge(Judged("train", 6, 2, False))
    for trial in PLAN.trials:
        folder.make_trial(CONFIG, trial, {}).close()
    with pytest.raises(kind) as caught:
        tune._conclude(study, folder, CONFIG, Console(quiet=True), tmp_path / "best.yaml", False)
    assert caught.value.exit_code == status and caught.value.advice
    assert not (tmp_path / "best.yaml").exists()


@pytest.mark.parametrize(
    ("keys", "write", "where"),
    [
        ({"memory": {"kind": "zero3", "shards": 2}}, None, "memory"),
        ({"memory": {"kind": "streamed", "offload": "nvme", "nvme_path": "/x"}}, None, "memory"),
        ({}, "there", "--write"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    keys: dict[str, object], write: str | None, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch.tune import tune

    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    config = RunConfig.model_validate({**CONFIG.model_dump(), **keys})
    (tmp_path / "run.yaml").write_text(dump(config))
    with pytest.raises(ConfigError) as caught:
        tune("run.yaml", [], Search(), write=None if write is None else Path(write))
    assert caught.value.where == where and not (tmp_path / "runs").exists()
