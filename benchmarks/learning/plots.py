"""The plots of docs/learning.md, as SVG whose bytes depend on the results alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from benchmarks.learning import fidelity, tasks
from benchmarks.learning.methods import METHODS
from benchmarks.learning.statistics import expected_cosine
from benchmarks.learning.summary import Cell

FOLDER = Path(__file__).parents[2] / "docs/learning"
_HEIGHT, _WIDTH = 4.0, 7.5


def plot_all(cells: Mapping[tuple[str, str], Cell], measured: list[dict[str, Any]]) -> None:
    """Write every plot there is something for."""
    FOLDER.mkdir(exist_ok=True)
    with pyplot.rc_context({"svg.hashsalt": "zoray", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        for task in tasks.VERSIONS:
            if any(cells[task, method].lasting for method in METHODS):
                _curves(task, cells)
        _rates(cells)
        _fidelity(measured)


def _curves(task: str, cells: Mapping[tuple[str, str], Cell]) -> None:
    """Mean held-out loss and its 95 % interval against forward passes."""
    figure, axes = pyplot.subplots(figsize=(_WIDTH, _HEIGHT))
    for number, (method, how) in enumerate(METHODS.items()):
        one = cells[task, method]
        if one.lasting:
            passes, losses = one.curve()
            style = "--" if number >= 10 else "-"
            (line,) = axes.plot(passes, [loss.mean for loss in losses], style, label=how.title, color=f"C{number % 10}")
            if math.isfinite(losses[0].half):
                low, high = [x.mean - x.half for x in losses], [x.mean + x.half for x in losses]
                axes.fill_between(passes, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel=f"forward passes of {tasks.ROWS} rows", ylabel="held-out loss", title=task)
    axes.legend(fontsize=7)
    _save(figure, task)


def _rates(cells: Mapping[tuple[str, str], Cell]) -> None:
    """Held-out loss at the end against the learning rate, one panel per task."""
    figure, panels = pyplot.subplots(1, len(tasks.VERSIONS), figsize=(1.5 * _WIDTH, _HEIGHT), squeeze=False)
    for axes, task in zip(panels[0], tasks.VERSIONS, strict=True):
        for number, (method, how) in enumerate(METHODS.items()):
            kept = {rate: loss for rate, loss in sorted(cells[task, method].tuning.items()) if math.isfinite(loss)}
            if kept:
                style = "--" if number >= 10 else "-"
                axes.plot(list(kept), list(kept.values()), f"o{style}", ms=3, label=how.title, color=f"C{number % 10}")
        axes.set(xscale="log", xlabel="learning rate", title=task)
    panels[0][0].set(ylabel="held-out loss at the end")
    panels[0][0].legend(fontsize=5)
    _save(figure, "rates")


def _fidelity(measured: list[dict[str, Any]]) -> None:
    """Cosine against K for each task and case, and the theory for as many weights as there are."""
    shown = list(dict.fromkeys((line["task"], line["case"]) for line in measured))
    if not shown:
        return
    figure, panels = pyplot.subplots(1, len(shown), figsize=(3 * len(shown), _HEIGHT), squeeze=False, sharey=True)
    for axes, case in zip(panels[0], shown, strict=True):
        of_case = [line for line in measured if (line["task"], line["case"]) == case]
        for line in of_case:
            axes.plot(fidelity.COUNTS, list(line["cosines"].values()), "o-", ms=3, label=line["kind"])
        theory = [expected_cosine(of_case[0]["weights"], count) for count in fidelity.COUNTS]
        axes.plot(fidelity.COUNTS, theory, "k:", label="√(K / (d + K − 1))")
        axes.set(xscale="log", yscale="log", xlabel="directions K", title=", ".join(case))
    panels[0][0].set(ylabel="cosine to the gradient")
    panels[0][0].legend(fontsize=6)
    _save(figure, "fidelity")


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)
