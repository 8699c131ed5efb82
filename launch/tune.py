"""`zoray tune`: find a learning rate and an epsilon on the user's own task, by successive halving."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.lock import held_by
from launch.cluster import connect
from launch.preflight import check_libraries, check_memory, check_paths
from launch.train import Stopped, interrupts
from launch.tune_words import conclusion, facts, judged_by, plan_lines, table, told
from zoray.config import (
    DIFFERENTIATING,
    GenerationTask,
    RunConfig,
    TrainableLora,
    TrainablePrefix,
    Zero3Memory,
    dump,
    load,
)
from zoray.errors import ConfigError, NumericsError, RunError, ZorayError
from zoray.tuning import Finish, Plan, Standing, Study, grid, longest_within, make_plan, stand
from zoray.tuning.deciding import passes_per_step
from zoray.tuning.folder import StudyFolder
from zoray.tuning.grid import kept

MOST_RUNGS = 3
LEAST_STEPS = 30
SHARE = 10
"""By default the last rung has one step of so many of the run's, but at least `LEAST_STEPS`."""


@dataclass(frozen=True, slots=True)
class Search:
    """What is tried, as the command line says it; None: by default.

    Attributes:
        learning_rates, epsilons: numbers between commas.
        rungs, eta: of successive halving.
        steps: of the last rung.
        budget: forward passes of all trials together, instead.
    """

    learning_rates: str | None = None
    epsilons: str | None = None
    rungs: int | None = None
    eta: int = 3
    steps: int | None = None
    budget: int | None = None


def tune(
    config_path: str,
    overrides: list[str],
    search: Search,
    *,
    name: str | None = None,
    write: Path | None = None,
    address: str | None = None,
    as_json: bool = False,
) -> None:
    """Search, or continue a search that was interrupted, and print what came of it.

    Args:
        config_path, overrides: of the run that is to be tuned.
        search: what is tried.
        name: of the study's folder; by default the configuration's run_name, or the file's name, and `-tune`.
        write: file for the configuration with the best values.
        address: of Ray.
        as_json: one JSON object at the end instead of words.

    Raises:
        ConfigError, RunError: the search cannot be made as asked, or another one has that name.
        NumericsError: all trials have diverged.
        ZorayError: no trial is better than the model as it is, as far as can be told.
        Stopped: it was stopped; the same command continues it.
    """
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    config = load(config_path, overrides)
    plan = plan_of(config, search)
    _check(config, write)
    folder = StudyFolder(Path(config.output_dir).absolute() / (name or _stem(config, config_path)))
    for trial in plan.trials:
        # Before anything is loaded: a rate may be none for the schedule or the weight decay.
        load(config_path, [*overrides, f"learning_rate={trial.learning_rate!r}", f"epsilon={trial.epsilon!r}"])
    console = Console(highlight=False, soft_wrap=True, quiet=as_json)
    known = folder.prepare(config, plan)
    for line in plan_lines(folder, config, plan, known):
        console.print(line, markup=False)
    study = folder.finished(config, plan)
    if study is None:
        with _nothing_left_behind(folder):
            study = _search(config, plan, folder, console)
    _conclude(study, folder, config, console, write, as_json)


def plan_of(config: RunConfig, search: Search) -> Plan:
    """The trials and rungs that are asked for.

    Raises:
        ConfigError: there can be no such search.
    """
    epsilons = _numbers(search.epsilons, "--epsilons")
    if config.estimator in DIFFERENTIATING:
        if epsilons is not None:
            what = f"Estimator {config.estimator} does not depend on epsilon."
            raise ConfigError(what, where="--epsilons", advice="Leave it out.")
        epsilons = [config.epsilon]
    trials = grid(
        config.learning_rate,
        config.epsilon,
        _numbers(search.learning_rates, "--learning-rates"),
        epsilons,
        larger=config.dtype != "float32" or config.update_rule.wants_curvature,
    )
    if search.steps is not None and search.budget is not None:
        raise ConfigError("--steps and --budget are both given.", where="--budget", advice="Give one of them.")
    rungs = search.rungs
    if rungs is None:
        # The last one should compare two trials at least.
        rungs = max(1, *(r for r in range(1, MOST_RUNGS + 1) if kept(len(trials), max(2, search.eta), r - 1) > 1))
    longest = search.steps or min(config.max_steps, max(LEAST_STEPS, config.max_steps // SHARE))
    if search.budget is not None:
        longest = longest_within(search.budget // passes_per_step(config), len(trials), rungs, max(2, search.eta))
    if longest > config.max_steps:
        raise ConfigError(
            f"The last rung would have {longest} steps, and the run has {config.max_steps}.",
            where="--budget" if search.steps is None else "--steps",
            advice="Give less, or raise max_steps.",
        )
    return make_plan(trials, longest, rungs, search.eta)


def _numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"{text!r} are not numbers.", where=option, advice="Write them as in 0.03,0.1.") from error


def _check(config: RunConfig, write: Path | None) -> None:
    """Refuse what can be refused before anything is made or started."""
    if isinstance(config.memory, Zero3Memory) or getattr(config.memory, "offload", "cpu") == "nvme":
        raise ConfigError(
            "A replica of a study is one process, and keeps the weights it began with in memory.",
            where="memory",
            advice="Use memory='{kind: resident}' or '{kind: streamed}' for the search: the result is the same.",
        )
    if isinstance(config.task, GenerationTask) and not config.evaluated_in_run:
        raise ConfigError(
            "Trials that generate text are judged by held-out examples, and there are none.",
            where="task.eval",
            advice="Name held-out data in task.eval, or set task.dev_samples.",
        )
    if write is not None and write.exists():
        raise ConfigError(f"There is a file {write} already.", where="--write", advice="Name another, or delete it.")
    check_paths(config)
    check_libraries(config)
    check_memory(config, copies=1 if isinstance(config.trainable, TrainableLora | TrainablePrefix) else 2)


def _stem(config: RunConfig, config_path: str) -> str:
    stem = config.run_name or re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config_path).stem).strip("-.") or "run"
    return f"{stem}-tune"


@contextmanager
def _nothing_left_behind(folder: StudyFolder) -> Iterator[None]:
    """Delete the folder of a study that fails before it has begun, unless it is another process's by then."""
    try:
        yield
    except BaseException:
        if folder.judged() is None and held_by(folder.path) is None:
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _search(config: RunConfig, plan: Plan, folder: StudyFolder, console: Console) -> Study:
    """Run the study to its end.

    Raises:
        ZorayError, Stopped: as `tune`.
    """
    place = connect(config)
    import ray

    from actors.tuning import Tuner

    console.print(f"  on {place.words}", markup=False)

    def noted(row: Mapping[str, Any]) -> None:
        if (line := told(row, folder.judged())) is not None:
            console.print(line, markup=False)

    tuner = Tuner(config, plan, folder, place.embedded, say=lambda text: console.print(text, markup=False), noted=noted)
    try:
        with _shown(console, plan) as show, interrupts(tuner.stop):
            finish: Finish = tuner.run(lambda study: show(study, tuner.pool.active))
    finally:
        ray.shutdown()
    if finish.reason == "stopped" or tuner.study is None:
        console.print("stopped; the same command continues the search", markup=False)
        raise Stopped(by_signal=True)
    if finish.reason == "failed":
        raise RunError(finish.text, where=str(folder.path), advice="see to it, then repeat the command to go on")
    return tuner.study


@contextmanager
def _shown(console: Console, plan: Plan) -> Iterator[Callable[[Study | None, int], None]]:
    """A line that says where the search is, on a terminal."""
    if not console.is_terminal:
        yield lambda study, replicas: None
        return
    with console.status("starting replicas") as status:

        def show(study: Study | None, replicas: int) -> None:
            if study is not None:
                rung = f"rung {study.rung + 1} of {len(plan.rungs)}"
                status.update(f"{study.steps_done} of {plan.steps} steps, {rung}, {replicas} replicas at work")

        yield show


def _conclude(
    study: Study, folder: StudyFolder, config: RunConfig, console: Console, write: Path | None, as_json: bool
) -> None:
    """Print the standing, draw it, and say by the exit status what came of it."""
    standing, judged = stand(study), folder.judged()
    assert judged is not None
    (console if console.is_terminal else Console(width=160, quiet=as_json)).print(table(standing, study), "")
    console.print(judged_by(judged, study), markup=False)
    for line in conclusion(standing, study, folder):
        console.print(line, markup=False)
    _draw(study, folder, config, console)
    if as_json:
        print(json.dumps(facts(standing, study, folder)))
    _require(study, standing)
    assert standing.trial is not None
    if write is not None:
        best = {"learning_rate": standing.trial.learning_rate, "epsilon": standing.trial.epsilon}
        try:
            write.write_text(dump(config.model_copy(update=best)), encoding="utf-8")
        except OSError as error:
            raise RunError(f"The configuration cannot be written: {error}.", where=str(write)) from error
        console.print(f"written to {write}", markup=False)


def _draw(study: Study, folder: StudyFolder, config: RunConfig, console: Console) -> None:
    from launch.tune_plot import draw

    try:
        draw(study, folder, passes_per_step(config))
    except ConfigError as error:
        # The table has said all there is; a picture is an extra.
        console.print(f"no picture: {error.what} {error.advice}", markup=False)
        return
    console.print(str(folder.plot), markup=False)


def _require(study: Study, standing: Standing) -> None:
    rates = [trial.learning_rate for trial in study.plan.trials]
    if standing.winner is None:
        raise NumericsError(
            f"There is no best trial: {'' if study.finish is None else study.finish.text}.",
            where="learning_rate",
            advice=f"try smaller ones: --learning-rates {_scaled(min(rates), 0.01, 0.03, 0.1, 0.3)}"
            if study.base.evaluations[0].finite
            else "look at the model and the data: `zoray train` with learning_rate=0 shows the same",
        )
    if not standing.improves:
        raise ZorayError(
            "No trial is better than the model as it is, as far as can be told after so few steps.",
            where="learning_rate",
            advice=f"give more --steps, or larger rates: --learning-rates {_scaled(max(rates), 3, 10, 30, 100)}",
        )


def _scaled(value: float, *factors: float) -> str:
    return ",".join(f"{value * factor:.3g}" for factor in factors)
