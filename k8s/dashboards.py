"""The Grafana dashboards, written out: `python k8s/dashboards.py` makes k8s/monitoring/*.json anew.

One model of dashboards, as short as it can be: what differs from panel to panel is its title, its queries and its unit.
Several coordinators can have been the same run, each in a pod of its own, so every query sums or takes the largest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "monitoring"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RUN = 'cluster=~"$cluster",namespace=~"$namespace",run="$run"'
RUNS = 'cluster=~"$cluster",namespace=~"$namespace",run=~"$run"'
WIDTH = 24

Json = dict[str, Any]
Query = tuple[str, str]


class Dashboard:
    """A dashboard under construction; panels are laid in rows from the left.

    Args:
        uid, title: of the dashboard.
        several: whether several runs can be chosen.
    """

    def __init__(self, uid: str, title: str, several: bool, annotations: list[Json]) -> None:
        self.panels: list[Json] = []
        self._x = self._y = self._height = 0
        self._json = {
            "uid": uid,
            "title": title,
            "tags": ["zoray"],
            "timezone": "browser",
            "schemaVersion": 39,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "10s",
            "time": {"from": "now-1h", "to": "now"},
            "annotations": {"list": annotations},
            "templating": {"list": _variables(several)},
            "links": [{"title": "Zoray", "type": "dashboards", "tags": ["zoray"], "asDropdown": False,
                       "includeVars": True, "keepTime": True}],
        }  # fmt: skip

    def row(self, title: str) -> None:
        """Begin a row with a heading."""
        self._line()
        self._add({"type": "row", "title": title, "collapsed": False, "panels": []}, WIDTH, 1)

    def stat(self, title: str, query: str, unit: str = "short", text: str = "", width: int = 4, **more: Any) -> None:
        """One number."""
        options = {"colorMode": "value", "graphMode": "area", "reduceOptions": {"calcs": ["lastNotNull"]}}
        panel = {"type": "stat", "title": title, "description": text, "options": options}
        self._query(panel, [("", query)], {"unit": unit, **more}, width, 4)

    def graph(
        self, title: str, queries: list[Query], unit: str = "short", text: str = "", width: int = 8, **more: Any
    ) -> None:
        """Curves over time; `queries` are pairs of a legend and a query."""
        custom = {"lineWidth": 1, "fillOpacity": 10, "showPoints": "auto", "spanNulls": False, **more.pop("custom", {})}
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
        panel = {"type": "timeseries", "title": title, "description": text, "options": options}
        self._query(panel, queries, {"unit": unit, "custom": custom, **more}, width, 8)

    def table(self, title: str, columns: list[tuple[str, str, str]]) -> None:
        """One line per run; `columns` are triples of a heading, a unit and a query by cluster, namespace and run."""
        names = {f"Value #{chr(65 + i)}": heading for i, (heading, _, _) in enumerate(columns)}
        overrides = [
            {"matcher": {"id": "byName", "options": heading}, "properties": [{"id": "unit", "value": unit}]}
            for heading, unit, _ in columns
        ]
        # The first says what the run is by its labels; its value is always 1.
        tidy = {"excludeByName": {"Time": True, "Value #A": True}, "renameByName": names}
        panel = {
            "type": "table",
            "title": title,
            "options": {"showHeader": True},
            "transformations": [{"id": "merge", "options": {}}, {"id": "organize", "options": tidy}],
        }
        self._query(panel, [("", query) for *_, query in columns], {}, WIDTH, 9)
        panel["fieldConfig"]["overrides"] = overrides
        for target in panel["targets"]:
            target |= {"instant": True, "range": False, "format": "table"}

    def write(self) -> None:
        """Write the JSON."""
        self._json["panels"] = self.panels
        (FOLDER / f"{self._json['uid']}.json").write_text(json.dumps(self._json, indent=2) + "\n")

    def _query(self, panel: Json, queries: list[Query], defaults: Json, width: int, height: int) -> None:
        panel["datasource"] = SOURCE
        panel["fieldConfig"] = {"defaults": defaults, "overrides": []}
        panel["targets"] = [
            {"refId": chr(65 + i), "datasource": SOURCE, "expr": query, "legendFormat": legend or "__auto"}
            for i, (legend, query) in enumerate(queries)
        ]
        self._add(panel, width, height)

    def _add(self, panel: Json, width: int, height: int) -> None:
        if self._x + width > WIDTH:
            self._line()
        panel["id"] = len(self.panels) + 1
        panel["gridPos"] = {"x": self._x, "y": self._y, "w": width, "h": height}
        self.panels.append(panel)
        self._x += width
        self._height = max(self._height, height)

    def _line(self) -> None:
        self._x, self._y, self._height = 0, self._y + self._height, 0


def _variables(several: bool) -> list[Json]:
    """Data source, cluster, namespace and run; the first two may be labels that no series has."""

    def labels(name: str, matchers: str, several: bool) -> Json:
        text = f"label_values(zoray_run_info{{{matchers}}}, {name})"
        return {"name": name, "label": name, "type": "query", "datasource": SOURCE, "definition": text,
                "query": {"query": text, "refId": name}, "refresh": 2, "sort": 1, "multi": several,
                "includeAll": several, "allValue": ".*" if several else None,
                "current": {"text": "All", "value": "$__all"} if several else {}}  # fmt: skip

    cluster = 'cluster=~"$cluster"'
    return [
        {"name": "datasource", "label": "data source", "type": "datasource", "query": "prometheus", "current": {}},
        labels("cluster", "", True),
        labels("namespace", cluster, True),
        labels("run", f'{cluster},namespace=~"$namespace"', several),
    ]


def _event(name: str, events: str, color: str) -> Json:
    query = f'sum by (event) (increase(zoray_replica_events_total{{{RUN},event=~"{events}"}}[1m])) > 0'
    return {"name": name, "datasource": SOURCE, "enable": True, "iconColor": color, "expr": query, "step": "60s",
            "titleFormat": "replica {{event}}", "useValueForTime": False}  # fmt: skip


def _rate(metric: str, by: str = "run", matchers: str = RUN) -> str:
    return f"sum by ({by}) (rate({metric}{{{matchers}}}[$__rate_interval]))"


def _latest(metric: str, by: str = "run", matchers: str = RUN) -> str:
    return f"max by ({by}) ({metric}{{{matchers}}})"


def _left(by: str, matchers: str, window: str) -> str:
    steps = f"({_latest('zoray_max_steps', by, matchers)} - {_latest('zoray_committed_steps', by, matchers)})"
    return f"{steps} / sum by ({by}) (rate(zoray_step_duration_seconds_count{{{matchers}}}[{window}]))"


def overview() -> Dashboard:
    """One run."""
    board = Dashboard("zoray-run", "Zoray / run overview", False, [
        _event("replicas joined", "joined", "green"),
        _event("replicas left or lost", "left|lost", "red"),
    ])  # fmt: skip
    board.stat("Steps committed", _latest("zoray_committed_steps"))
    progress = f"{_latest('zoray_committed_steps')} / {_latest('zoray_max_steps')}"
    board.stat("Progress", progress, "percentunit", min=0, max=1)
    board.stat("Time left", _left("run", RUN, "5m"), "s", "at the speed of the last five minutes")
    board.stat("Loss", _latest("zoray_loss"), decimals=4)
    board.stat("Held-out loss", _latest("zoray_eval_loss"), decimals=4)
    active = RUN + ',state="active"'
    board.stat("Replicas at work", _latest("zoray_replicas", "run", active))

    board.row("Learning")
    smooth = f"max by (run) (avg_over_time(zoray_loss{{{RUN}}}[5m]))"
    board.graph("Loss", [
        ("training", _latest("zoray_loss")),
        ("training, mean of 5 minutes", smooth),
        ("held-out", _latest("zoray_eval_loss")),
    ], width=12)  # fmt: skip
    board.graph(
        "Size of the gradient", [("projected gradient, root mean square", _latest("zoray_projected_gradient_rms"))],
        text="of the directions of the last step", width=6,
    )  # fmt: skip
    noise = f"max by (run) (avg_over_time(zoray_gradient_noise_ratio{{{RUN}}}[5m]))"
    board.graph(
        "Noise of the batches", [("share of the gradient's mean square", noise)], "percentunit", min=0,
        text="mean of 5 minutes; near 100 %, more rows or directions a step would tell more of the gradient", width=6,
    )  # fmt: skip
    board.graph("Held-out accuracy and score", [
        ("accuracy", _latest("zoray_eval_accuracy_ratio")),
        ("score", _latest("zoray_eval_score")),
    ], "percentunit")  # fmt: skip
    board.graph("Learning rate", [
        ("learning rate", _latest("zoray_learning_rate")),
        ("steps are multiplied with, since the loss has risen", _latest("zoray_step_factor")),
    ], "sci")  # fmt: skip
    board.graph("Directions clipped and not finite", [
        ("clipped", f"{_rate('zoray_clipped_directions_total')} / {_rate('zoray_directions_total')}"),
        ("not finite", f"{_rate('zoray_nonfinite_directions_total')} / {_rate('zoray_directions_total')}"),
    ], "percentunit", min=0, text="share of the directions probed")  # fmt: skip

    board.row("Speed")
    steps = f"ignoring (phase) group_left () {_rate('zoray_step_duration_seconds_count')}"
    phases = f"{_rate('zoray_step_phase_seconds_total', 'run, phase')} / {steps}"
    board.graph(
        "Where a step's time goes", [("{{phase}}", phases)],
        "s", "seconds per step, per replica; probing includes applying commits", 12,
        custom={"stacking": {"mode": "normal"}, "fillOpacity": 60},
    )  # fmt: skip
    board.graph("Duration of a step", [
        (f"{share}th percentile", f"histogram_quantile(0.{share}, {_rate('zoray_step_duration_seconds_bucket', 'le')})")
        for share in (50, 95)
    ], "s", width=12)  # fmt: skip
    board.graph("Tokens a second", [("tokens", _rate("zoray_tokens_total"))], width=8)
    board.graph("Directions a second", [("directions", _rate("zoray_directions_total"))], width=8)
    board.graph("Writing a commit to the ledger", [
        (f"{share}th percentile", f"histogram_quantile(0.{share}, {_rate('zoray_ledger_append_seconds_bucket', 'le')})")
        for share in (50, 95)
    ], "s", "from deciding to being on disk")  # fmt: skip

    board.row("Replicas")
    board.graph("Replicas", [
        ("{{state}}", _latest("zoray_replicas", "state")),
        ("wanted", _latest("zoray_target_replicas")),
    ], custom={"lineInterpolation": "stepAfter"}, width=12)  # fmt: skip
    changes = f"sum by (event) (increase(zoray_replica_events_total{{{RUN}}}[$__rate_interval]))"
    board.graph("Coming and going", [("{{event}}", changes)], custom={"drawStyle": "bars"}, width=12)
    board.graph("Lag", [("{{replica}}", _latest("zoray_replica_lag_steps", "replica"))],
                text="committed steps a replica is not known to hold")  # fmt: skip
    board.graph("Memory of the replicas", [
        ("{{replica}} {{kind}}", _latest("zoray_replica_memory_bytes", "replica, kind")),
    ], "bytes", min=0)  # fmt: skip
    own = _latest("zoray_coordinator_memory_bytes")
    board.graph("Memory of the coordinator", [("coordinator", own)], "bytes", min=0)

    board.row("Exchange and faults")
    board.graph("Bytes a second", [
        ("{{flow}}", _rate("zoray_exchanged_bytes_total", "flow")),
        ("data-parallel training would have sent", _rate("zoray_data_parallel_bytes_total")),
    ], "Bps", custom={"scaleDistribution": {"type": "log", "log": 10}}, width=12)  # fmt: skip
    sent = f"sum by (run) (zoray_exchanged_bytes_total{{{RUN}}})"
    times = f"sum by (run) (zoray_data_parallel_bytes_total{{{RUN}}}) / {sent}"
    board.stat("Data-parallel training would have sent", times, "none",
               "times as many bytes, since this coordinator began", decimals=0)  # fmt: skip
    faults = f"sum by (kind) (increase(zoray_faults_total{{{RUN}}}[$__rate_interval]))"
    board.graph("Faults", [
        ("{{kind}}", faults),
        ("skipped steps", f"sum by (run) (increase(zoray_skipped_steps_total{{{RUN}}}[$__rate_interval]))"),
    ], custom={"drawStyle": "bars"})  # fmt: skip
    return board


def fleet() -> Dashboard:
    """All runs."""
    board = Dashboard("zoray-fleet", "Zoray / fleet", True, [])
    each = "cluster, namespace, run"
    board.stat("Runs", f"count(max by ({each}) (zoray_run_info{{{RUNS}}}))")
    active = RUNS + ',state="active"'
    board.stat("Replicas at work", f"sum(zoray_replicas{{{active}}})")
    board.stat("Replicas wanted", f"sum(zoray_target_replicas{{{RUNS}}})")
    board.stat("Tokens a second", f"sum(rate(zoray_tokens_total{{{RUNS}}}[$__rate_interval]))")
    quiet = f"time() - max by ({each}) (zoray_last_commit_timestamp_seconds{{{RUNS}}}) > 900"
    board.stat("Runs without a commit for 15 minutes", f"count({quiet}) or vector(0)")
    board.stat("Replicas lost in the last hour",
               f'sum(increase(zoray_replica_events_total{{{RUNS},event="lost"}}[1h]))', decimals=0)  # fmt: skip

    def latest(metric: str, more: str = "") -> str:
        return _latest(metric, each, RUNS + more)

    board.table("All runs", [
        ("about", "none", f"max by ({each}, model, version) (zoray_run_info{{{RUNS}}})"),
        ("step", "none", latest("zoray_committed_steps")),
        ("of", "none", latest("zoray_max_steps")),
        ("loss", "none", latest("zoray_loss")),
        ("held-out loss", "none", latest("zoray_eval_loss")),
        ("replicas", "none", latest("zoray_replicas", ',state="active"')),
        ("wanted", "none", latest("zoray_target_replicas")),
        ("tokens/s", "short", f"sum by ({each}) (rate(zoray_tokens_total{{{RUNS}}}[5m]))"),
        ("left", "s", _left(each, RUNS, "5m")),
        ("since the last commit", "s", f"time() - {latest('zoray_last_commit_timestamp_seconds')}"),
    ])  # fmt: skip
    legend = "{{namespace}} {{run}}"
    progress = f"{latest('zoray_committed_steps')} / {latest('zoray_max_steps')}"
    board.graph("Progress", [(legend, progress)], "percentunit", min=0, max=1)
    board.graph("Loss", [(legend, f"max by ({each}) (avg_over_time(zoray_loss{{{RUNS}}}[5m]))")],
                text="of training, mean of five minutes")  # fmt: skip
    board.graph("Held-out loss", [(legend, latest("zoray_eval_loss"))])
    board.graph("Replicas at work", [(legend, f"sum by ({each}) (zoray_replicas{{{active}}})")],
                custom={"lineInterpolation": "stepAfter"})  # fmt: skip
    board.graph("Tokens a second", [(legend, _rate("zoray_tokens_total", each, RUNS))])
    seconds, steps = (_rate(f"zoray_step_duration_seconds_{part}", each, RUNS) for part in ("sum", "count"))
    mean = f"{seconds} / {steps}"
    board.graph("Duration of a step", [(legend, mean)], "s", "mean")
    board.graph("Bytes a second", [
        (legend, _rate("zoray_exchanged_bytes_total", each, RUNS)),
        (f"{legend}, data-parallel", _rate("zoray_data_parallel_bytes_total", each, RUNS)),
    ], "Bps", custom={"scaleDistribution": {"type": "log", "log": 10}})  # fmt: skip
    board.graph("Memory of the replicas", [
        (legend, f'sum by ({each}) (zoray_replica_memory_bytes{{{RUNS},kind="resident"}})'),
    ], "bytes", "resident, all replicas together", min=0)  # fmt: skip
    faults = f"sum by ({each}) (increase(zoray_faults_total{{{RUNS}}}[$__rate_interval]))"
    board.graph("Faults", [(legend, faults)], custom={"drawStyle": "bars"})
    return board


if __name__ == "__main__":
    overview().write()
    fleet().write()
