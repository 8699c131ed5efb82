"""What `zoray tune` says: the plan, what happens to trials, the table and the conclusion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from zoray.config import RunConfig
from zoray.tuning import BASE, Evaluated, Phase, Plan, Race, Standing, Study
from zoray.tuning.deciding import passes_per_step
from zoray.tuning.folder import Judged, StudyFolder


def plan_lines(folder: StudyFolder, config: RunConfig, plan: Plan, known: bool) -> Iterator[str]:
    """What will be done, before it is."""
    rates = _listed(sorted({trial.learning_rate for trial in plan.trials}))
    epsilons = _listed(sorted({trial.epsilon for trial in plan.trials}))
    yield f"study {folder.name}" + (", continued" if known else "")
    yield f"  {len(plan.trials)} trials: learning_rate {rates}; epsilon {epsilons}"
    rungs = ", ".join(f"{plan.entering(i)} of {steps} steps" for i, steps in enumerate(plan.rungs))
    passes = plan.steps * passes_per_step(config)
    yield f"  trials in each rung: {rungs}; in all {plan.steps} steps, {passes:,} forward passes"
    yield f"  folder {folder.path}"


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def told(row: Mapping[str, Any], judged: Judged | None) -> str | None:
    """What happened to a trial, in a line; None if that is not worth one."""
    rung = f"rung {row['rung'] + 1}"
    if row["event"] == "evaluated":
        name = "the model as it is" if row["trial"] == BASE else f"{rung}  {row['trial']}  step {row['step']}"
        loss = judged.words if judged is not None else "loss"
        return f"{name}: {loss} {row['loss']:.4f} ± {row['standard_error']:.4f}"
    if row["event"] == "diverged":
        return f"{rung}  {row['trial']}  step {row['step']}: dropped, it diverges: {row['text']}"
    return f"{rung}  {row['trial']}: cut, {row['text']}" if row["event"] == "cut" else None


def table(standing: Standing, study: Study) -> Table:
    """The trials, best first."""
    classified = any(each.accuracy is not None for race in standing.races for each in race.evaluations)
    found = Table(box=None)
    for name in ("trial", "learning_rate", "epsilon", "rung", "steps", "loss", *(["accuracy"] if classified else [])):
        found.add_column(name, justify="left" if name == "trial" else "right", no_wrap=True)
    found.add_column("state")
    for race in (*standing.races, study.base):
        last = race.evaluations[-1] if race.evaluations else None
        cells = ["", "", ""]
        if race.trial is not None:
            rung = min(len(race.evaluations) + (race.phase is Phase.DIVERGED), len(study.plan.rungs))
            cells = [f"{race.trial.learning_rate:g}", f"{race.trial.epsilon:g}", str(max(1, rung))]
        steps = min(race.step, race.target(study.plan))
        loss = "-" if last is None else f"{last.loss:.4f} ± {last.standard_error:.4f}"
        accuracy = [] if not classified else ["-" if last is None else f"{last.correct / last.count:.1%}"]
        row = [race.name, *cells, str(steps), loss, *accuracy, _state(race, standing)]
        found.add_row(*row, style="bold" if race is standing.winner else None)
    return found


def _state(race: Race, standing: Standing) -> str:
    if race.trial is None:
        return "the model as it is"
    if race is standing.winner:
        return "best"
    if race.phase is Phase.RUNNING:
        return "last rung, not told from the best" if race in standing.undecided else "last rung"
    return f"{race.phase.value}: {race.why}"


def judged_by(judged: Judged, study: Study) -> str:
    """What the trials were judged on."""
    if judged.source == "eval":
        return f"judged by the loss on {judged.examples} held-out examples"
    seen = "no step of the study trains on them" if judged.fresh else "the study trains on them too"
    text = f"there are no held-out data (task.eval): judged by the loss on {judged.examples} training examples"
    return f"{text}, those that a run comes to last; {seen}"


def conclusion(standing: Standing, study: Study, folder: StudyFolder) -> Iterator[str]:
    """The best trial, how sure that is, and what to do with it."""
    best = standing.winner
    if best is None or best.trial is None:
        return
    start, last = study.base.evaluations[0], best.evaluations[-1]
    yield f"best: {best.name}, {_gain(start, last)} than the model as it is after {_steps(best, study)} steps"
    if standing.undecided:
        names = ", ".join(race.name for race in standing.undecided)
        yield f"  not told from it, example by example: {names}; more --steps would tell"
    else:
        rivals = [race for race in standing.races if len(race.evaluations) == len(best.evaluations)]
        if len(rivals) > 1:
            yield "  told from the others of its rung by more than two standard errors, example by example"
    for key in standing.edges:
        value = getattr(best.trial, key)
        side = "largest" if value == max(getattr(trial, key) for trial in study.plan.trials) else "smallest"
        factors = (1, 3, 10, 30) if side == "largest" else (0.03, 0.1, 0.3, 1)
        option = "--" + key.replace("_", "-") + "s"
        more = ",".join(f"{value * factor:.3g}" for factor in factors)
        yield f"  its {key} is the {side} that was tried; the best may lie beyond: {option} {more} --name NAME"
    yield ""
    yield f"learning_rate: {best.trial.learning_rate!r}"
    yield f"epsilon: {best.trial.epsilon!r}"
    yield ""
    yield "a run with them begins with the steps of that trial, which can be gone on from:"
    yield f"  zoray resume {folder.trial(best.name).reference}"


def _gain(start: Evaluated, last: Evaluated) -> str:
    difference, error = last.above(start)
    return f"{abs(difference):.4f} ± {error:.4f} {'lower' if difference <= 0 else 'higher'}"


def _steps(race: Race, study: Study) -> int:
    return study.plan.rungs[len(race.evaluations) - 1]


def facts(standing: Standing, study: Study, folder: StudyFolder) -> dict[str, Any]:
    """All of it for `--json`."""

    def evaluation(each: Evaluated) -> dict[str, Any]:
        return {"loss": each.loss, "standard_error": each.standard_error, "accuracy": each.accuracy}

    def trial(race: Race) -> dict[str, Any]:
        assert race.trial is not None
        return {
            "trial": race.name,
            "learning_rate": race.trial.learning_rate,
            "epsilon": race.trial.epsilon,
            "steps": min(race.step, race.target(study.plan)),
            "state": "best" if race is standing.winner else race.phase.value,
            "why": race.why,
            "evaluations": [evaluation(each) for each in race.evaluations],
        }

    return {
        "study": str(folder.path),
        "start": evaluation(study.base.evaluations[0]),
        "rungs": list(study.plan.rungs),
        "trials": [trial(race) for race in standing.races],
        "best": None if standing.winner is None else standing.winner.name,
        "improves": standing.improves,
        "undecided": [race.name for race in standing.undecided],
        "edges": list(standing.edges),
    }
