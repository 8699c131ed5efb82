"""The exporter: what steps, faults and a loop that hangs make of the values it serves."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import pytest

from actors.exporter import Exporter
from actors.journal import Split
from tests.unit.test_exporter import MEMBERS
from tests.unit.test_journal import record
from zoray.protocol import Counters, Evaluation
from zoray.protocol.membership import Slot, SlotPhase


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    made = Exporter("r", "m", 7)
    yield made
    made.close()


def value(exporter: Exporter, name: str, **labels: str) -> float | None:
    return exporter.registry.get_sample_value(f"zoray_{name}", {"run": "r", **labels})


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_step_shows(exporter: Exporter) -> None:
    exporter.begin(4)
    assert value(exporter, "committed_steps") == 4
    assert value(exporter, "max_steps") == 7
    exporter.committed(record(4), Split(2.0, 1.5, 0.25, 0.25), 80.0)
    exporter.committed(record(5), Split(1.0, 0.5, 0.25, 0.25), 80.0)
    assert value(exporter, "committed_steps") == 6
    assert value(exporter, "loss") == 2.5
    assert value(exporter, "learning_rate") == 0.5
    assert value(exporter, "projected_gradient_rms") == pytest.approx(math.sqrt(12.5))
    assert value(exporter, "step_duration_seconds_sum") == 3.0
    assert value(exporter, "ledger_append_seconds_count") == 2
    assert value(exporter, "step_phase_seconds_total", phase="probe") == 2.0
    assert value(exporter, "step_phase_seconds_total", phase="wait") == 0.5
    assert value(exporter, "tokens_total") == 160
    assert value(exporter, "directions_total") == 4
    assert value(exporter, "clipped_directions_total") == 2
    assert value(exporter, "skipped_steps_total") == 0


def test_a_step_without_a_finite_probe_shows(exporter: Exporter) -> None:
    exporter.committed(record(gradients=(math.nan, math.inf)), Split(), 1.0)
    assert value(exporter, "nonfinite_directions_total") == 2
    assert value(exporter, "skipped_steps_total") == 1
    rms = value(exporter, "projected_gradient_rms")
    assert rms is not None and math.isnan(rms)


def test_faults_are_counted_once(exporter: Exporter) -> None:
    for counters in (Counters(lost=1), Counters(lost=1), Counters(lost=3, late=1)):
        exporter.beat(MEMBERS, counters)
    assert value(exporter, "faults_total", kind="lost") == 3
    assert value(exporter, "faults_total", kind="late") == 1
    assert value(exporter, "faults_total", kind="diverged") == 0


def test_bytes_replicas_and_evaluations(exporter: Exporter) -> None:
    phases = {"r0": SlotPhase.ACTIVE, "r1": SlotPhase.ACTIVE, "r2": SlotPhase.STARTING}
    exporter.exchanged(15, 0)
    exporter.exchanged(15, 31)
    exporter.beat(replace(MEMBERS, slots={name: Slot("n", phase, 0.0) for name, phase in phases.items()}), Counters())
    exporter.evaluated(Evaluation(1.25, 0.1, 8, 6))
    assert value(exporter, "exchanged_bytes_total", flow="sent") == 30
    assert value(exporter, "exchanged_bytes_total", flow="received") == 31
    assert [value(exporter, "replicas", state=s) for s in ("active", "starting", "leaving")] == [2, 1, 0]
    assert value(exporter, "target_replicas") == 2
    assert (value(exporter, "eval_loss"), value(exporter, "eval_accuracy_ratio")) == (1.25, 0.75)


def test_two_runs_do_not_mix(exporter: Exporter) -> None:
    other = Exporter("r", "m", 7)
    other.begin(3)
    assert value(exporter, "committed_steps") == 0


def test_health_goes_with_the_loop(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("actors.exporter.time.monotonic", lambda: now[0])
    port = exporter.serve(0)
    # Replicas that take long to load a model are not a coordinator that hangs.
    now[0] += 1000
    assert get(port, "/health")[0] == 200
    exporter.beat(MEMBERS, Counters())
    now[0] += 29
    status, text = get(port, "/health")
    assert (status, json.loads(text)) == (200, {"run": "r", "ok": True, "seconds_since_last_turn": 29.0})
    now[0] += 2
    status, text = get(port, "/health")
    assert status == 503 and json.loads(text)["ok"] is False
    exporter.beat(MEMBERS, Counters())
    assert get(port, "/health")[0] == 200


def test_metrics_are_served_until_closed() -> None:
    exporter = Exporter("r", "m", 7)
    port = exporter.serve(0)
    assert 'zoray_max_steps{run="r"} 7.0' in get(port, "/metrics")[1]
    exporter.close()
    with pytest.raises(urllib.error.URLError):
        get(port, "/metrics")
