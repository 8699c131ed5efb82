"""The benchmark of learning: its statistics, its grid and its file are right, and every method trains."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.learning import fidelity, runs, store, summary, workers
from benchmarks.learning.methods import METHODS, MeZO, Zoray
from benchmarks.learning.runs import EVALUATION, TUNING, Outcome, Run, grid, train, tuned, wanted
from benchmarks.learning.sequence import BLANK, DOWNWARDS, Sequence, examples
from benchmarks.learning.statistics import effective_dimension, estimate, expected_cosine, first_below, paired
from benchmarks.learning.tasks import mean_loss, scores

NAN = math.nan


def outcome(*losses: float, diverged: bool = False) -> Outcome:
    return Outcome(tuple((100.0 * i, NAN if i == 0 else 1.0, loss, 0.5) for i, loss in enumerate(losses)), diverged)


def test_estimate_is_students_interval() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3 and found.count == 5
    # t of 4 degrees of freedom at 97.5 % is 2.7764; the standard deviation is sqrt(2.5).
    assert found.half == pytest.approx(2.7764 * math.sqrt(2.5 / 5), rel=1e-4)
    assert math.isinf(estimate([1.0]).half)
    with pytest.raises(ValueError):
        estimate([])


def test_pairs_are_of_seeds_that_both_have() -> None:
    found = paired({1: 1.0, 2: 3.0, 9: 100.0}, {1: 0.5, 2: 2.0, 8: 0.0})
    assert found is not None and (found.mean, found.count) == (0.75, 2)
    assert paired({1: 1.0}, {2: 1.0}) is None


@pytest.mark.parametrize(
    ("target", "passes"), [(5.0, 0.0), (4.0, 0.0), (3.5, 50.0), (2.0, 150.0), (1.5, None), (2.9, 105.0)]
)
def test_a_curve_first_comes_down(target: float, passes: float | None) -> None:
    found = first_below([0, 100, 150, 300], [4.0, 3.0, 2.0, 2.5], target)
    assert found == (None if passes is None else pytest.approx(passes))


def test_effective_dimension_undoes_theory() -> None:
    assert effective_dimension(expected_cosine(12_345, 16), 16) == pytest.approx(12_345)
    assert expected_cosine(1, 7) == 1


def test_theory_of_the_cosine_holds_for_signs() -> None:
    random = np.random.default_rng(0)
    gradient = random.standard_normal(40)
    gradient /= np.linalg.norm(gradient)
    pairs = []
    for _ in range(4000):
        z = random.choice([-1.0, 1.0], (8, 40))
        found = (z @ gradient) @ z / 8
        pairs.append((float(found @ gradient), float(np.linalg.norm(found))))
    assert fidelity.ratio(pairs) == pytest.approx(expected_cosine(40, 8), rel=0.02)


def test_grid_is_around_its_middle() -> None:
    assert grid(1e-3) == [1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2]


def fill(results: dict[Run, Outcome], losses: dict[float, float], method: str = "rank1") -> None:
    for rate, loss in losses.items():
        for seed in TUNING:
            results[Run("sequence", method, rate, seed)] = outcome(1.0, loss, diverged=math.isinf(loss))


def test_what_is_missing_is_made_and_nothing_else() -> None:
    cells = [("sequence", "rank1")]
    results: dict[Run, Outcome] = {}
    rates = grid(METHODS["rank1"].middle(Sequence()))
    first = list(wanted(results, cells))
    assert [run.rate for run in first if run.seed == TUNING[0]] == rates and {run.seed for run in first} == set(TUNING)
    assert list(wanted(results, cells, flying=first[:2])) == first[2:]
    fill(results, dict(zip(rates, [0.9, 0.7, 0.6, 0.8, math.inf], strict=True)))
    between = [rate for rate in grid(rates[2], 3, 10**0.25) if rate not in rates]
    assert sorted({run.rate for run in wanted(results, cells)}) == between
    fill(results, {between[0]: 0.7, between[1]: 0.5})
    second = list(wanted(results, cells))
    assert second == [Run("sequence", "rank1", between[1], seed) for seed in EVALUATION]
    results |= dict.fromkeys(second, outcome(1.0, 0.6))
    assert list(wanted(results, cells)) == []


def test_grid_grows_while_the_best_is_at_its_edge() -> None:
    results: dict[Run, Outcome] = {}
    rates = grid(METHODS["rank1"].middle(Sequence()))
    fill(results, dict(zip(rates, [0.5, 0.6, 0.7, 0.8, math.inf], strict=True)))
    best, more = tuned(results, "sequence", "rank1")
    assert best is None and more[1:] == rates and more[0] == pytest.approx(rates[0] / math.sqrt(10), rel=1e-2)
    fill(results, {more[0]: 0.55})
    best, finer = tuned(results, "sequence", "rank1")
    assert best is None and len(finer) == len(more) + 2
    fill(results, dict.fromkeys(set(finer) - set(more), 0.6))
    assert tuned(results, "sequence", "rank1") == (rates[0], finer)


def test_grid_stops_growing() -> None:
    results: dict[Run, Outcome] = {}
    best, rates = tuned(results, "sequence", "rank1")
    while best is None:
        fill(results, {rate: 0.1 + rate for rate in rates})
        best, rates = tuned(results, "sequence", "rank1")
    assert best == rates[0] and len(rates) == runs.RATES + runs.EXTENSIONS + 2


def test_a_diverged_seed_rules_a_rate_out() -> None:
    results = {Run("sequence", "rank1", 1.0, TUNING[0]): outcome(1.0, 0.1, diverged=True)}
    assert runs.mean_final(results, "sequence", "rank1", 1.0, TUNING) == math.inf


def test_file_keeps_what_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first, second = Run("sequence", "rank1", 1e-3, 1), Run("prose", "mezo", 1e-4, 2)
    store.append(first, outcome(1.0, 0.5), 1.0, "abc", path)
    with path.open("a") as file:
        file.write('{"task": "prose", "cut sho')
    assert set(store.read(path)) == {first}
    store.append(second, outcome(2.0, math.inf, diverged=True), 1.0, "abc", path)
    found = store.read(path)
    assert set(found) == {first, second} and found[second].final == math.inf
    assert found[first].curve[1] == (100.0, 1.0, 0.5, 0.5)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_results_of_other_versions_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run = Run("sequence", "rank1", 1e-3, 1)
    store.append(run, outcome(1.0, 0.5), 1.0, "abc", path)
    line = json.loads(path.read_text())
    path.write_text(json.dumps(line | {"versions": [line["versions"][0] + 1, line["versions"][1]]}) + "\n")
    assert store.read(path) == {}


def test_share_of_the_passes_to_a_loss() -> None:
    ours = summary.Cell({}, 1.0, {1: outcome(1.0, 0.4, 0.2), 2: outcome(1.0, 0.9, 0.8)})
    theirs = summary.Cell({}, 1.0, {1: outcome(1.0, 0.9, 0.8), 2: outcome(1.0, 0.8, 0.6)})
    share, never = summary.share_to_reach(ours, theirs)
    # Theirs end at 0.7 after 200 passes: ours is there after 50, and with the other seed never.
    assert share is not None and share.mean == pytest.approx(0.25) and never == 1


def test_cells_go_by_the_patterns_order() -> None:
    found = workers.cells(["sequence/adamw", "sequence/*", "prose/mezo"])
    assert found[0] == ("sequence", "adamw") and found[-1] == ("prose", "mezo")
    assert len(found) == len(set(found)) == len(METHODS) + 1


def test_a_sequence_is_sorted_downwards() -> None:
    batch = examples(np.random.default_rng(0), np.array([DOWNWARDS, 0]), np.array([BLANK, BLANK]))
    row = batch["input_ids"][0]
    assert sorted(row[1:9].tolist(), reverse=True) == row[10:].tolist() == batch["labels"][0, 10:].tolist()
    assert batch["input_ids"][1, 1:9].tolist() == batch["input_ids"][1, 10:].tolist()
    assert (batch["labels"][:, :10] == -100).all()


class Short(Sequence):
    """Long enough for one step of any method."""

    budget = 32
    interval = 32

    def __init__(self) -> None:
        rows = self._rows(2, 16)
        self.__dict__["held_out"] = rows


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_the_passes_it_says(method: str) -> None:
    task, how = Short(), METHODS[method]
    model, counted = task.adapted() if how.adapters else task.model(), list[int]()
    step = how.start(model, lambda number: task.batch(1, number, how.rows), 1)
    step(0, 1e-6)  # which also proves the paths
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]

    def count(module: torch.nn.Module, args: object, options: dict[str, torch.Tensor]) -> None:
        counted.append(len(options["input_ids"]))

    model.register_forward_pre_hook(count, with_kwargs=True)
    loss = step(1, how.fixed or how.middle(task))
    assert 0 < loss < 3
    assert not any(torch.equal(old, new) for old, new in zip(before, trained, strict=True))
    backward = 2 if method == "adamw" else 0
    assert sum(counted) == (how.evaluations - backward) * how.rows


def test_what_is_not_tuned_has_one_rate_and_ends_with_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.tasks, "get", lambda name: Short())
    wants = list(wanted({}, [("sequence", "default-third")]))
    assert {(run.rate, run.seed) for run in wants} == {(METHODS["default-third"].fixed, seed) for seed in EVALUATION}
    found = train(wants[0])[0]
    assert found.curve[-1][0] >= Short.budget / 3 > found.curve[-2][0]


@pytest.mark.parametrize("method", ["mezo", "rank1"])
def test_a_run_is_repeatable(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.tasks, "get", lambda name: Short())
    first, second = (train(Run("sequence", method, 1e-4, 1))[0] for _ in range(2))
    assert first.curve[1:] == second.curve[1:]
    assert [point[0] for point in first.curve] == [0, Short.budget]
    assert first.final == first.curve[-1][2] != first.curve[0][2]


def test_a_run_whose_update_cannot_be_written_down_has_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.tasks, "get", lambda name: Short())
    found, _ = train(Run("sequence", "rank1", 1e45, 1))
    assert found.diverged and found.final == math.inf and len(found.curve) == 1


def test_runs_are_made_once_and_a_failure_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Run] = []

    def work(run: Run) -> tuple[Outcome, float]:
        made.append(run)
        if run.seed == EVALUATION[1]:
            raise ValueError("a run that fails")
        return outcome(1.0, run.rate), 0.0

    monkeypatch.setattr(workers, "train", work)
    monkeypatch.setattr(workers, "pool", ThreadPoolExecutor)
    path = tmp_path / "results.jsonl"
    with pytest.raises(RuntimeError, match="seed=2"):
        workers.make_missing(["sequence/rank1"], 2, math.inf, path)
    assert len(made) == len(set(made)) == len(store.read(path)) + 1
    first = len(made)
    workers.make_missing(["sequence/rank1"], 1, 0.0, path)
    assert len(made) == first
    with pytest.raises(RuntimeError):
        workers.make_missing(["sequence/rank1"], 1, math.inf, path)
    assert made[first:] == [run for run in made[:first] if run.seed == EVALUATION[1]]


def test_methods_see_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[int]] = {}
    for name, method in (("one", Zoray(title="", directions=1)), ("four", Zoray(title="", directions=4))):
        task, numbers = Short(), seen.setdefault(name, [])

        def batch_of(number: int, task: Short = task, numbers: list[int] = numbers) -> dict[str, torch.Tensor]:
            numbers.append(number)
            return task.batch(1, number)

        step = method.start(task.model(), batch_of, 1)
        for number in range(8 // method.evaluations + 1):
            step(number, 0.0)
    assert seen["one"][:4] == seen["four"][:4] == [0, 1, 2, 3]


def test_float_scalars_are_what_int8_rounds() -> None:
    task, moved = Short(), {}
    before = dict(task.model().named_parameters())
    for scalars in ("int8", "float32"):
        model = task.model()
        Zoray(title="", scalars=scalars).start(model, lambda n: task.batch(1, n), 1)(0, 1e-3)  # type: ignore[arg-type]
        moved[scalars] = torch.cat([(p - before[name]).flatten() for name, p in model.named_parameters()]).detach()
    gap = (moved["int8"] - moved["float32"]).norm() / moved["float32"].norm()
    assert 0 < gap < 0.02


def test_mezo_comes_back_to_where_it_was() -> None:
    task = Short()
    model = task.model()
    before = [p.detach().clone() for p in model.parameters()]
    loss = MeZO(title="").start(model, lambda n: task.batch(1, n), 1)(0, 0.0)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, model.parameters(), strict=True))
    assert loss == pytest.approx(mean_loss(model, task.batch(1, 0)).item(), rel=0.05)


def test_scores_count_labelled_targets_only() -> None:
    task = Short()
    losses, right = scores(task.model(), task.batch(1, 0))
    assert losses.shape == right.shape == (16 * 8,)


def test_true_gradient_is_that_of_the_whole() -> None:
    task = Short()
    model, batch = task.model(), task.batch(1, 0) | {}
    doubled = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
    found = fidelity.true_gradient(model, doubled)
    mean_loss(model, batch).backward()
    assert all(torch.allclose(found[name], p.grad, atol=1e-6) for name, p in model.named_parameters())
