"""The dashboards of k8s/monitoring, read and asked: their panels' queries against a Prometheus, over its HTTP API.

    python -m benchmarks.dashboards

makes a run with a kill and a scale-up in it, watched by `zoray monitor`, and draws the curves of both dashboards into
docs/: our own plot of the same queries over the same data, since no Grafana can be had on the machine of the tests.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "k8s" / "monitoring"
PORT = 19090

Series = tuple[dict[str, str], list[tuple[float, float]]]
"""Labels, and pairs of time (Unix, seconds) and value."""


@dataclass(frozen=True)
class Panel:
    """What a panel, or an annotation, asks for.

    Attributes:
        kind: stat, timeseries, table or annotation.
        queries: pairs of a legend and a PromQL expression with Grafana's variables in it.
        options: unit, min, max and `custom` of the panel.
    """

    title: str
    kind: str
    queries: tuple[tuple[str, str], ...]
    options: dict[str, Any]


def panels(path: Path) -> list[Panel]:
    """The panels of a dashboard that ask for something, then its annotations."""
    board = json.loads(path.read_text())
    found = []
    for each in board["panels"]:
        queries = tuple((target["legendFormat"], target["expr"]) for target in each.get("targets", ()))
        if queries:
            found.append(Panel(each["title"], each["type"], queries, each["fieldConfig"]["defaults"]))
    for each in board["annotations"]["list"]:
        found.append(Panel(each["name"], "annotation", (("", each["expr"]),), {"color": each["iconColor"]}))
    return found


def expand(expression: str, run: str, window: str) -> str:
    """An expression with Grafana's variables put in: all clusters and namespaces, some runs, `$__rate_interval`."""
    values = {"cluster": ".*", "namespace": ".*", "run": run, "__rate_interval": window}
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], expression)


@dataclass(frozen=True)
class Api:
    """The HTTP API of a Prometheus."""

    url: str

    def over(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        """The values of an expression between two times, every so many seconds."""
        answer = self._ask("query_range", query=expression, start=start, end=end, step=step)
        return [(each["metric"], [(t, float(v)) for t, v in each["values"]]) for each in answer["result"]]

    def at(self, expression: str, when: float | None = None) -> list[Series]:
        """The value of an expression at a time; by default now."""
        answer = self._ask("query", query=expression, **({} if when is None else {"time": when}))
        if answer["resultType"] == "scalar":
            answer = {"result": [{"metric": {}, "value": answer["result"]}]}
        return [(each["metric"], [(each["value"][0], float(each["value"][1]))]) for each in answer["result"]]

    def _ask(self, what: str, **parameters: object) -> Any:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]


def draw(path: Path, api: Api, run: str, start: float, end: float, to: Path) -> None:
    """Draw the panels of a dashboard over a time, two to a row, the numbers and the table above them in words."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = panels(path)
    graphs = [panel for panel in found if panel.kind == "timeseries"]
    events = [panel for panel in found if panel.kind == "annotation"]
    rows = math.ceil(len(graphs) / 3)
    figure, axes = plt.subplots(rows, 3, figsize=(18, 3.2 * rows), layout="constrained")
    moments = [(panel.options["color"], _moments(api, panel, run, start, end)) for panel in events]
    for axis, panel in zip(axes.flat, graphs, strict=False):
        _draw_panel(axis, panel, api, run, start, end)
        for color, times in moments:
            for moment in times:
                axis.axvline(moment - start, color=color, linewidth=1, linestyle=":")
    for axis in axes.flat[len(graphs) :]:
        axis.axis("off")
    title = json.loads(path.read_text())["title"]
    facts = "    ".join(_fact(panel, api, run, start, end) for panel in found if panel.kind == "stat")
    figure.suptitle(f"{title}\n{facts}\nseconds since the beginning of the run", fontsize=11)
    figure.savefig(to, dpi=70, format="png")
    plt.close(figure)


def _draw_panel(axis: Any, panel: Panel, api: Api, run: str, start: float, end: float) -> None:
    custom = panel.options.get("custom", {})
    stacked = custom.get("stacking", {}).get("mode") == "normal"
    curves = []
    for legend, expression in panel.queries:
        for labels, points in api.over(expand(expression, run, "4s"), start, end, 0.5):
            name = re.sub(r"\{\{(\w+)\}\}", lambda found, labels=labels: labels.get(found[1], ""), legend)
            curves.append((name, [t - start for t, _ in points], [v for _, v in points]))
    if stacked and curves:
        shortest = min(len(x) for _, x, _ in curves)
        axis.stackplot(curves[0][1][:shortest], *[y[:shortest] for *_, y in curves], labels=[n for n, *_ in curves])
    for name, x, y in [] if stacked else curves:
        if custom.get("drawStyle") == "bars" and not any(y):
            continue
        after = custom.get("lineInterpolation") == "stepAfter"
        axis.plot(x, y, label=name, drawstyle="steps-post" if after else "default", linewidth=1.5)
    if "scaleDistribution" in custom:
        axis.set_yscale("log")
    axis.set_title(f"{panel.title} [{panel.options['unit']}]", fontsize=10)
    axis.set_xlim(0, end - start)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=7, ncols=2)


def _moments(api: Api, panel: Panel, run: str, start: float, end: float) -> list[float]:
    """When something happened: where the counter behind an annotation rises."""
    inner = re.search(r"increase\((.*?)\[", expand(panel.queries[0][1], run, "4s"))
    assert inner is not None
    times = []
    for _, points in api.over(inner[1], start, end, 0.25):
        times += [t for (_, before), (t, after) in pairwise(points) if after > before]
    return times


def _fact(panel: Panel, api: Api, run: str, start: float, end: float) -> str:
    # The last there was: at the very end the run is gone.
    values = [v for _, points in api.over(expand(panel.queries[0][1], run, "4s"), start, end, 0.5) for _, v in points]
    return f"{panel.title}: {values[-1]:,.4g}" if values else f"{panel.title}: -"


def _watched(folder: Path) -> None:
    """Two runs, the second one with a kill and a scale-up, and the pictures of both dashboards."""
    import ray

    from actors.coordinator import Coordinator
    from benchmarks.cluster import make_inputs
    from zoray.config import RunConfig
    from zoray.protocol.membership import SlotPhase
    from zoray.runs import RunFolder

    inputs = make_inputs(folder, large=False)
    data = folder / "text.jsonl"
    inputs |= {"task": {"kind": "causal_lm", "train": str(data), "eval": str(data), "max_length": 64},
               "learning_rate": 2e-3, "per_direction_batch_size": 16, "directions": 8, "max_steps": 10_000,
               "eval_steps": 10}  # fmt: skip
    api, began = Api(f"http://127.0.0.1:{PORT}"), time.time()

    def run(name: str, replicas: int, acts: list[tuple[int, Any]]) -> float:
        """Act when there have been that many active replicas for another 15 steps."""
        config = RunConfig.model_validate({**inputs, "replicas": replicas, "run_name": name})
        coordinator = Coordinator(config, str(RunFolder.create(config, name).path), embedded=True)
        coordinator.prepare(False)
        report, started, since = coordinator.journal.report, time.time(), [0]

        def reported(record: Any) -> None:
            report(record)
            if not acts or coordinator.roster.count(SlotPhase.ACTIVE) != acts[0][0]:
                since[0] = record.step
            elif record.step >= since[0] + 15:
                acts.pop(0)[1](coordinator)
                since[0] = record.step

        coordinator.journal.report = reported  # type: ignore[method-assign]
        coordinator.run()
        return started

    def kill(coordinator: Any) -> None:
        os.kill(coordinator.roster.admission.introductions["r0"].pid, signal.SIGKILL)

    def grow(coordinator: Any) -> None:
        coordinator.scale(3)

    run("first", 1, [(1, Coordinator.stop)])
    started = run("second", 2, [(2, kill), (2, grow), (3, Coordinator.stop)])
    ended = time.time()
    docs = ROOT / "docs"
    draw(FOLDER / "zoray-run.json", api, "second", started, ended, docs / "monitoring-run.png")
    draw(FOLDER / "zoray-fleet.json", api, ".*", began, ended, docs / "monitoring-fleet.png")
    ray.shutdown()


def main() -> None:
    """Make the runs and draw the pictures."""
    import ray

    if shutil.which("prometheus") is None:
        sys.exit("Prometheus is not installed: apt-get install prometheus")
    with tempfile.TemporaryDirectory() as name:
        options = ["--output-dir", f"{name}/runs", "--port", str(PORT), "--interval", "0.5"]
        watching = subprocess.Popen([sys.executable, "-m", "launch.cli", "monitor", *options], cwd=ROOT)
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            _watched(Path(name))
        finally:
            watching.send_signal(signal.SIGINT)
            watching.wait()


if __name__ == "__main__":
    main()
