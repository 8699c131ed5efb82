"""The picture of a study: loss against learning rate, and the curves against forward passes."""

from __future__ import annotations

import math
from typing import Any

from launch.plot import smooth
from zoray.errors import ConfigError, RunError
from zoray.tuning import Phase, Race, Study, stand
from zoray.tuning.folder import StudyFolder

_MARKERS, _LINES = "osD^vP*", ("-", "--", ":", "-.")


def draw(study: Study, folder: StudyFolder, passes_per_step: int) -> None:
    """Write `plot.png` of a study.

    Raises:
        ConfigError: matplotlib is not installed.
        RunError: the picture cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ConfigError("Drawing needs matplotlib.", advice="pip install 'zoray[plot]'") from error
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    judged = folder.judged()
    name = judged.words if judged is not None else "loss"
    _draw_rates(left, study, plt.get_cmap("viridis"))
    left.set(title=f"{name} ± standard error, by rung", xlabel="learning rate", xscale="log")
    _draw_curves(right, study, folder, passes_per_step, plt.get_cmap("plasma"))
    right.set(title=f"training loss (lines) and {name} (points)", xlabel="forward passes of the trial")
    for axis in (left, right):
        _cap(axis, study)
        axis.grid(alpha=0.3)
    figure.suptitle(folder.name, fontweight="bold")
    try:
        figure.savefig(folder.plot, dpi=120, format="png")
    except OSError as error:
        raise RunError(f"The picture cannot be written: {error}.", where=str(folder.plot)) from error
    finally:
        plt.close(figure)


def _draw_rates(axis: Any, study: Study, colors: Any) -> None:
    """A line for each epsilon and rung."""
    races = [race for race in study.races.values() if race.trial is not None]
    epsilons = sorted({trial.epsilon for trial in study.plan.trials})
    for i, epsilon in enumerate(epsilons):
        for rung, steps in enumerate(study.plan.rungs):
            points = [
                (race.trial.learning_rate, race.evaluations[rung].loss, race.evaluations[rung].standard_error)
                for race in races
                if race.trial is not None and race.trial.epsilon == epsilon and len(race.evaluations) > rung
            ]
            if not points:
                continue
            x, y, error = zip(*sorted(points), strict=True)
            axis.errorbar(
                x,
                y,
                # Of one example there is none.
                yerr=[0.0 if math.isnan(each) else each for each in error],
                color=colors((rung + 0.5) / len(study.plan.rungs)),
                marker=_MARKERS[i % len(_MARKERS)],
                linestyle=_LINES[i % len(_LINES)],
                capsize=2,
                label=f"epsilon {epsilon:g}, {steps} steps",
            )
    axis.axhline(study.base.evaluations[0].loss, color="#888888", linewidth=1, label="the model as it is")
    axis.legend(fontsize=7)


def _draw_curves(axis: Any, study: Study, folder: StudyFolder, passes: int, colors: Any) -> None:
    standing = stand(study)
    rates = sorted({trial.learning_rate for trial in study.plan.trials})
    epsilons = sorted({trial.epsilon for trial in study.plan.trials})
    for race in reversed(standing.races):
        assert race.trial is not None
        losses = folder.losses(race.name)[: race.target(study.plan)]
        color = colors(0.9 * rates.index(race.trial.learning_rate) / max(1, len(rates) - 1))
        best = race is standing.winner
        line = _LINES[epsilons.index(race.trial.epsilon) % len(_LINES)]
        curve = smooth(losses, 0.1)
        label = race.name + (" (best)" if best else " (diverged)" if race.phase is Phase.DIVERGED else "")
        x = [passes * (step + 1) for step in range(len(curve))]
        axis.plot(x, curve, color=color, linewidth=2.5 if best else 1, linestyle=line, label=label)
        _draw_points(axis, study, race, passes, color)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize=6, ncols=2)


def _draw_points(axis: Any, study: Study, race: Race, passes: int, color: Any) -> None:
    x = [passes * steps for steps, _ in zip(study.plan.rungs, race.evaluations, strict=False)]
    axis.plot(x, [each.loss for each in race.evaluations], color=color, marker="o", markersize=4, linestyle="none")


def _cap(axis: Any, study: Study) -> None:
    """Keep trials that run away from pressing all others into a line."""
    start = study.base.evaluations[0]
    low, high = axis.get_ylim()
    room = max(start.loss - low, 0.1 * abs(start.loss))
    axis.set_ylim(low, min(high, start.loss + room))
