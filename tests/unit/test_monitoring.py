"""What k8s/monitoring holds: metrics that exist, dashboards that are laid out, objects that a cluster accepts."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.exporter import Exporter
from actors.lock import RunLock
from benchmarks.dashboards import expand, panels
from launch.monitor import DASHBOARDS, SHIPPED, Site, find_grafana, find_prometheus
from launch.service import Service
from tests.unit.crds import faults, needs_crds
from tests.unit.test_exporter import documented
from zoray.config import RunConfig
from zoray.errors import ResourceError
from zoray.runs import RunFolder

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s" / "monitoring"
BOARDS = [FOLDER / name for name in DASHBOARDS]
ANYWHERE = {"run", "cluster", "namespace", "instance", "pod", "container", "endpoint", "le"}
"""Labels of every metric, those a target has, and the one of a histogram's buckets."""

WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan", "by", "without", "on", "ignoring", "group_left"}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "prometheusrule.yaml").read_text())["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def names(expression: str) -> set[str]:
    """The metrics of a PromQL expression: every word that is no function, keyword, label, string or duration."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left)\s*\([^)]*\)", " ", bare)
    words = re.findall(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?!\s*\(|[\w:])", bare)
    return {word for word in words if word.lower() not in WORDS}


def labels(expression: str) -> set[str]:
    """The labels of a PromQL expression."""
    found = {
        label for inside in re.findall(r"\{([^}]*)\}", expression) for label in re.findall(r"(\w+)\s*[=!]", inside)
    }
    for inside in re.findall(r"\b(?:by|without|on|ignoring|group_left)\s*\(([^)]*)\)", expression):
        found |= set(re.findall(r"\w+", inside))
    return found


def known() -> dict[str, set[str]]:
    """Every name that may be asked for, with its own labels."""
    found = {}
    for name, (kind, own) in documented().items():
        for suffix in ("_bucket", "_sum", "_count") if kind == "histogram" else ("",):
            found[name + suffix] = set(own)
    return found | {rule["record"]: set() for rule in rules() if "record" in rule}


def expressions() -> Iterator[tuple[str, str]]:
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"]
    for board in BOARDS:
        for panel in panels(board):
            for _, expression in panel.queries:
                yield f"{board.stem}: {panel.title}", expand(expression, "r", "1m")


def test_only_documented_metrics_and_labels_are_asked_for() -> None:
    seen = set()
    for where, expression in expressions():
        asked = names(expression)
        assert asked and asked <= known().keys(), (where, asked - known().keys())
        assert labels(expression) <= ANYWHERE.union(*(known()[name] for name in asked)), where
        seen |= asked
    # All there is can be seen, but for what only says how to read the rest.
    unseen = {name for name in known() if name.startswith("zoray_")} - seen
    assert unseen <= {"zoray_ledger_append_seconds_sum", "zoray_ledger_append_seconds_count"}, unseen


def test_names_of_an_expression() -> None:
    text = (
        'sum by (run) (rate(a_total{run="b_c",x=~"d"}[5m])) / on (e) group_left (f) g:h > 0.5e3 and no_a{} or vector(1)'
    )
    assert names(text) == {"a_total", "g:h", "no_a"}
    assert labels(text) == {"run", "x", "e", "f"}


def test_the_dashboards_are_what_the_generator_writes(tmp_path: Path) -> None:
    made = runpy.run_path(str(ROOT / "k8s" / "dashboards.py"))
    for board in (made["overview"](), made["fleet"]()):
        made["Dashboard"].write.__globals__["FOLDER"] = tmp_path
        board.write()
    for path in BOARDS:
        assert (tmp_path / path.name).read_text() == path.read_text(), "run python k8s/dashboards.py"


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_a_dashboard_can_be_provisioned(path: Path) -> None:
    board = json.loads(path.read_text())
    assert [variable["name"] for variable in board["templating"]["list"]] == [
        "datasource",
        "cluster",
        "namespace",
        "run",
    ]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    covered: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not covered & cells and at["x"] + at["w"] <= 24, panel["title"]
        covered |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
            for variable in ("$cluster", "$namespace", "$run"):
                assert variable in target["expr"], panel["title"]


def test_every_alert_of_the_issue_is_there_and_says_what_to_do() -> None:
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    assert alerts.keys() == {
        "ZorayRunStalled", "ZorayNoReplicas", "ZorayReplicaFlapping", "ZorayDigestDisagreement",
        "ZorayNonFiniteScalars", "ZorayLedgerWriteSlow", "ZorayLossDiverging",
    }  # fmt: skip
    for alert in alerts.values():
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert "{{ $labels.run }}" in alert["annotations"]["summary"] and alert["annotations"]["description"]


@needs_crds
@pytest.mark.parametrize("name", ["podmonitor", "prometheusrule"])
def test_the_operator_accepts_the_objects(name: str) -> None:
    thing = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert faults(thing) == []
    thing["spec"]["unheard"] = 1
    assert len(faults(thing)) == 1 and "unheard" in faults(thing)[0]


def test_kustomize_labels_the_dashboards_for_the_sidecar() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl on the PATH")
    text = subprocess.run(["kubectl", "kustomize", str(FOLDER)], check=True, capture_output=True, text=True).stdout
    things = {thing["kind"]: thing for thing in yaml.safe_load_all(text)}
    assert things.keys() == {"ConfigMap", "PodMonitor", "PrometheusRule"}
    assert things["ConfigMap"]["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert things["ConfigMap"]["data"].keys() == set(DASHBOARDS)


def test_the_operator_is_sent_to_the_port_that_a_run_on_the_cluster_names() -> None:
    path = ROOT / "k8s" / "base" / "run" / "rayjob.yaml"
    if not path.is_file():
        pytest.skip(f"the run's manifest is not here: {path}")
    head = yaml.safe_load(path.read_text())["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    named = {port["name"] for container in head["containers"] for port in container.get("ports", ())}
    monitor = yaml.safe_load((FOLDER / "podmonitor.yaml").read_text())
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= named


# ---- zoray monitor ----


def test_the_package_has_the_files_of_the_checkout() -> None:
    assert SHIPPED.resolve() == FOLDER
    patterns = re.search(r"^launch = (\[.*\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert patterns is not None
    packed = {path.name for pattern in json.loads(patterns[1]) for path in (ROOT / "launch").glob(pattern)}
    assert {*DASHBOARDS, "prometheusrule.yaml"} <= packed


def test_runs_in_progress_are_found_and_others_are_not(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    site = Site(tmp_path / "site", 1)
    site.write()
    assert site.discover(runs) == []
    config = RunConfig.model_validate(
        {"model": "m", "task": {"kind": "causal_lm", "train": "t"}, "max_steps": 1, "output_dir": str(runs)}
    )
    folders = {name: RunFolder.create(config, name) for name in ("live", "ended", "lost", "silent")}
    exporter = Exporter("live", "m", 1)
    try:
        host = socket.gethostname()
        url = f"http://{host}:{exporter.serve(0)}/metrics"
        for name, state in (("live", "running"), ("ended", "done"), ("lost", "running")):
            folders[name].write_state({"state": state, "host": host, "metrics_url": url})
        with RunLock(folders["live"].path), RunLock(folders["ended"].path):
            assert site.discover(runs) == [folders["live"].name]
            (group,) = json.loads((site.folder / "targets.json").read_text())
            assert group["labels"] == {"cluster": "local", "namespace": "runs"}
            assert group["targets"] == [f"127.0.0.1:{url.split(':')[2].split('/')[0]}"]
            folders["live"].write_state({"state": "running", "metrics_url": "http://elsewhere.example:9400/metrics"})
            site.discover(runs)
            (group,) = json.loads((site.folder / "targets.json").read_text())
            assert group["targets"] == ["elsewhere.example:9400"]
        assert site.discover(runs) == []
        assert json.loads((site.folder / "targets.json").read_text()) == []
    finally:
        exporter.close()


def test_grafana_is_given_the_same_dashboards(tmp_path: Path) -> None:
    site = Site(tmp_path, 9099, 2.5)
    site.write()
    (provider,) = yaml.safe_load((tmp_path / "provisioning/dashboards/zoray.yaml").read_text())["providers"]
    boards = Path(provider["options"]["path"])
    assert {path.name: path.read_text() for path in boards.iterdir()} == {b.name: b.read_text() for b in BOARDS}
    (source,) = yaml.safe_load((tmp_path / "provisioning/datasources/zoray.yaml").read_text())["datasources"]
    assert source["url"] == "http://127.0.0.1:9099" and source["jsonData"]["timeInterval"] == "2500ms"


def test_without_prometheus_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="not installed") as caught:
        find_prometheus()
    assert caught.value.advice is not None and "apt-get install prometheus" in caught.value.advice
    assert find_grafana() is None


def test_an_installation_without_the_rules_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.monitor.SHIPPED", tmp_path / "nowhere")
    with pytest.raises(ResourceError, match="missing from this installation"):
        Site(tmp_path, 1).write()


def test_a_server_that_ends_at_once_is_said_with_its_last_words(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-c", "import sys; sys.exit('no such key: colour')"]
    with (
        pytest.raises(ResourceError, match="status 1: no such key: colour") as caught,
        Service("Server", command, port, "/", tmp_path / "log"),
    ):
        pass
    assert str(tmp_path / "log") in str(caught.value)


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    exporter = Exporter("r", "m", 1)
    port = exporter.serve(0)
    try:
        with (
            pytest.raises(ResourceError, match=f"cannot have port {port}"),
            Service("Server", [sys.executable], port, "/", tmp_path / "log"),
        ):
            pass
    finally:
        exporter.close()
