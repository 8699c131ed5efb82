"""`zoray plot`: one PNG of loss, evaluation, gradient size and step time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from zoray.errors import ConfigError, RunError
from zoray.runs import RunFolder

_PHASES = (
    ("probe_seconds", "probe", "#4c78a8"),
    ("commit_seconds", "commit", "#e45756"),
    ("wait_seconds", "wait", "#bbbbbb"),
)


def plot(run: str, to: Path | None, output_dir: str) -> None:
    """Draw a run's metrics.

    Raises:
        RunError: the run is unknown, has no step yet, or the picture cannot be written.
        ConfigError: matplotlib is not installed.
    """
    folder = RunFolder.find(run, output_dir)
    steps, evaluations = list(folder.rows("steps")), list(folder.rows("evaluations"))
    if not steps:
        raise RunError(f"{folder.name} has no step to draw yet.", where=str(folder.path))
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ConfigError("Drawing needs matplotlib.", advice="pip install 'zoray[plot]'") from error
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    _draw_curve(axes[0, 0], steps, "loss", "training loss", "#4c78a8")
    _draw_evaluations(axes[0, 1], evaluations)
    _draw_curve(axes[1, 0], steps, "gradient_rms", "projected gradient, root mean square", "#b279a2")
    _draw_time(axes[1, 1], steps)
    figure.suptitle(f"{folder.name}: {steps[-1]['step'] + 1} steps", fontweight="bold")
    path = to or folder.path / "plot.png"
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise RunError(f"The picture cannot be written: {error}.", where=str(path)) from error
    finally:
        plt.close(figure)
    Console(highlight=False, soft_wrap=True).print(str(path), markup=False)


def smooth(values: list[float], share: float = 0.02) -> list[float]:
    """Exponential moving average over about `share` of the values; NaNs are passed over."""
    rate = 1 / max(1.0, share * len(values))
    level, out = float("nan"), []
    for value in values:
        if value == value:
            level = value if level != level else level + rate * (value - level)
        out.append(level)
    return out


def _draw_curve(axis: Any, rows: list[dict[str, Any]], key: str, title: str, color: str) -> None:
    """A noisy quantity of each step, and its moving average."""
    x, y = [row["step"] for row in rows], [row[key] for row in rows]
    # One point has no line.
    axis.plot(x, y, color=color, alpha=0.3, linewidth=1, marker="o" if len(rows) == 1 else None)
    axis.plot(x, smooth(y), color=color, linewidth=2)
    axis.set(title=title, xlabel="step")
    axis.grid(alpha=0.3)


def _draw_evaluations(axis: Any, rows: list[dict[str, Any]]) -> None:
    axis.set(title="held-out loss ± standard error", xlabel="step")
    axis.grid(alpha=0.3)
    if not rows:
        axis.text(0.5, 0.5, "no held-out data", ha="center", va="center", transform=axis.transAxes)
        return
    x, y, error = ([row[key] for row in rows] for key in ("step", "loss", "standard_error"))
    axis.plot(x, y, color="#54a24b", marker="o", markersize=4)
    low, high = ([a + sign * b for a, b in zip(y, error, strict=True)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color="#54a24b", alpha=0.25, linewidth=0)
    if any(row["correct"] for row in rows):
        twin = axis.twinx()
        share = [100 * row["correct"] / row["count"] for row in rows]
        twin.plot(x, share, color="#f58518", linestyle="--", marker="s", markersize=3)
        twin.set_ylabel("accuracy, % (dashed)", color="#f58518")
        twin.tick_params(axis="y", colors="#f58518")


def _draw_time(axis: Any, rows: list[dict[str, Any]]) -> None:
    x = [row["step"] for row in rows]
    parts = [[row[key] for row in rows] for key, *_ in _PHASES]
    if len(rows) == 1:
        # A stack over one point has no area.
        x, parts = [x[0] - 0.5, x[0] + 0.5], [part * 2 for part in parts]
    axis.stackplot(x, *parts, labels=[label for _, label, _ in _PHASES], colors=[color for *_, color in _PHASES])
    typical = sorted(row["seconds"] for row in rows)[int(0.98 * (len(rows) - 1))]
    axis.set(title="seconds per step", xlabel="step", ylim=(0, 1.3 * typical or 1))
    axis.legend(loc="upper right", fontsize=8)
    axis.grid(alpha=0.3)
