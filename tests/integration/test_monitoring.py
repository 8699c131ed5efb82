"""A real Prometheus: the rules, every alert, and every panel of the dashboards over a live run."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.dashboards import Api, Panel, expand, panels
from launch.monitor import DASHBOARDS, SHIPPED
from tests.integration import prometheus
from tests.integration.alerts import CASES
from tests.integration.conftest import Inputs, Launch
from tests.integration.warm import WarmFleet
from zoray.protocol.membership import SlotPhase

ROOT = Path(__file__).parents[2]
STEPS, PATIENCE = 24, 240.0

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of `prometheus` and `promtool`."""
    return prometheus.find()


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The groups of the PrometheusRule as a file of rules."""
    path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    spec = yaml.safe_load((SHIPPED / "prometheusrule.yaml").read_text())["spec"]
    path.write_text(yaml.safe_dump(spec))
    return path


def promtool(programs: Path, *words: str) -> str:
    done = subprocess.run([str(programs / "promtool"), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_rules_are_sound(programs: Path, rules: Path) -> None:
    assert "14 rules found" in promtool(programs, "check", "rules", str(rules))


def test_every_alert_fires_when_it_must_and_only_then(programs: Path, rules: Path) -> None:
    tests = []
    for case in CASES:
        series = [
            {"series": name.replace("{", '{run="a",') if "{" in name else name + '{run="a"}', "values": values}
            for name, values in case.series.items()
        ]
        query = f'count(ALERTS{{alertname="{case.alert}",alertstate="firing",run="a"}})'
        expected = [{"labels": "{}", "value": 1}] if case.fires else []
        asked = {"expr": query, "eval_time": f"{case.minute}m", "exp_samples": expected}
        title = f"{case.alert} {'fires' if case.fires else 'is quiet'} at {case.minute} min: {case.series}"
        tests.append({"name": title, "interval": "1m", "input_series": series, "promql_expr_test": [asked]})
    path = rules.with_name("cases.yaml")
    path.write_text(yaml.safe_dump({"rule_files": [rules.name], "evaluation_interval": "1m", "tests": tests}))
    promtool(programs, "test", "rules", str(path))
    alerts = {rule["alert"] for group in yaml.safe_load(rules.read_text())["groups"] for rule in group["rules"]
              if "alert" in rule}  # fmt: skip
    for fires in (True, False):
        assert {case.alert for case in CASES if case.fires is fires} == alerts


def test_an_alert_says_what_happened(programs: Path, rules: Path) -> None:
    """promtool compares the texts as they come out of their templates."""
    case = next(case for case in CASES if case.alert == "ZorayRunStalled" and case.fires)
    series = [{"series": name + '{run="a"}', "values": values} for name, values in case.series.items()]
    texts = {
        "summary": "The run a has stalled.",
        "description": "No step has been committed for 20m 0s. `zoray status a` says what each replica does; "
        "the log of the run says what happened last.",
    }
    told = {"exp_labels": {"run": "a", "severity": "critical"}, "exp_annotations": texts}
    asked = {"eval_time": "30m", "alertname": case.alert, "exp_alerts": [told]}
    tests = [{"interval": "1m", "input_series": series, "alert_rule_test": [asked]}]
    path = rules.with_name("texts.yaml")
    path.write_text(yaml.safe_dump({"rule_files": [rules.name], "evaluation_interval": "1m", "tests": tests}))
    promtool(programs, "test", "rules", str(path))


class MortalFleet(WarmFleet):
    """Processes that were killed are not used again."""

    def kill(self, name: str, pid: int) -> None:
        (self._dead,) = self._actors[name]
        os.kill(pid, signal.SIGKILL)

    def _kill(self, actor: Any) -> None:
        if actor is not getattr(self, "_dead", None):
            super()._kill(actor)


@pytest.fixture
def monitored(programs: Path, tmp_path: Path) -> Iterator[Api]:
    """`zoray monitor` over tmp_path/runs, as a user starts it, looking four times a second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "launch.cli", "monitor", "--port", str(port), "--interval", "0.25"]
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, "--output-dir", str(tmp_path / "runs")], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert f"http://127.0.0.1:{port}" in process.stdout.readline()
            yield Api(f"http://127.0.0.1:{port}")
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 0
            # Prometheus has ended with it.
            with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=5):
                pass
        finally:
            # Never killed: it has a server to end.
            process.terminate()


def wait_until(coordinator: Any, what: Callable[[], object]) -> None:
    """Go on taking in what happens until something is so."""
    until = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < until, "nothing came of it"
        coordinator.inbox.turn(0.05)


def numbers(api: Api, panel: Panel, expression: str, run: str, start: float, end: float) -> int:
    """How many finite values a query of a panel gives for the time of the run."""
    asked = expand(expression, run, "3s")
    found = api.at(asked, end) if panel.kind == "table" else api.over(asked, start, end, 0.5)
    return sum(math.isfinite(value) for _, points in found for _, value in points)


def test_every_panel_has_data_of_a_run_with_a_kill_and_a_scale_up(
    monitored: Api, warm: None, monkeypatch: pytest.MonkeyPatch, inputs: Inputs, launch: Launch, tmp_path: Path
) -> None:
    monkeypatch.setattr("actors.roster.Fleet", MortalFleet)
    end = 0.0

    def at(coordinator: Any, record: Any) -> None:
        nonlocal end
        if record.aggregate is None:
            return
        # Every step waits for Prometheus to have seen it, however fast this machine is.
        query = f'zoray_committed_steps{{run="{coordinator.folder.name}"}} == {record.step + 1}'
        wait_until(coordinator, lambda: monitored.at(query))
        if record.step == 8:
            coordinator.roster.fleet.kill("r0", coordinator.roster.admission.introductions["r0"].pid)
            # At once, so that both newcomers start together.
            coordinator.scale(3)
        if record.step == 12:
            # It was given a probe since, so its death is known.
            assert "r0" not in coordinator.roster.members.slots
            wait_until(coordinator, lambda: coordinator.roster.count(SlotPhase.ACTIVE) == 3)
        end = time.time()

    keys = {"replicas": 2, "max_steps": STEPS, "eval_steps": 8, "output_dir": str(tmp_path / "runs")}
    start = time.time()
    ran = launch(inputs.config(**keys), at=at)
    assert ran.finish.reason == "done"
    run = ran.folder.name

    empty = []
    for name in DASHBOARDS:
        for panel in panels(SHIPPED / name):
            for _, expression in panel.queries:
                if not numbers(monitored, panel, expression, run, start, end):
                    empty.append((name, panel.title, expression))
    assert empty == []
    for group in yaml.safe_load((SHIPPED / "prometheusrule.yaml").read_text())["spec"]["groups"]:
        for rule in group["rules"]:
            assert "record" not in rule or monitored.over(rule["record"], start, end, 1), rule

    def largest(metric: str) -> float:
        return max(value for _, points in monitored.over(metric, start, end, 0.25) for _, value in points)

    assert largest('zoray_replica_events_total{event="lost"}') == 1
    assert largest('zoray_replica_events_total{event="joined"}') == 4
    assert largest('zoray_replicas{state="active"}') == 3
    assert largest("zoray_data_parallel_bytes_total") > 10 * largest("sum(zoray_exchanged_bytes_total)")
    assert largest('zoray_replica_memory_bytes{kind="resident"}') > 2**20
