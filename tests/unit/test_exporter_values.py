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
from tests.unit.test_exporter import MEMBERS, STATE
from tests.unit.test_journal import record
from zoray.protocol import Counters, Evaluation
from zoray.protocol.membership import Slot, SlotPhase
from zoray.protocol.state import Member


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
    assert value(exporter, "gradient_noise_ratio") == pytest.approx(1 / 12.5)
    assert value(exporter, "step_factor") == 1
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
        exporter.beat(MEMBERS, replace(STATE, counters=counters))
    assert value(exporter, "faults_total", kind="lost") == 3
    assert value(exporter, "faults_total", kind="late") == 1
    assert value(exporter, "faults_total", kind="diverged") == 0


def test_bytes_replicas_and_evaluations(exporter: Exporter) -> None:
    phases = {"r0": SlotPhase.ACTIVE, "r1": SlotPhase.ACTIVE, "r2": SlotPhase.STARTING}
    exporter.exchanged(15, 0)
    exporter.exchanged(15, 31)
    exporter.beat(replace(MEMBERS, slots={name: Slot("n", phase, 0.0) for name, phase in phases.items()}), STATE)
    exporter.evaluated(Evaluation(1.25, 0.1, 8, 6, 0.5))
    assert value(exporter, "exchanged_bytes_total", flow="sent") == 30
    assert value(exporter, "exchanged_bytes_total", flow="received") == 31
    assert [value(exporter, "replicas", state=s) for s in ("active", "starting", "leaving")] == [2, 1, 0]
    assert value(exporter, "target_replicas") == 2
    assert (value(exporter, "eval_loss"), value(exporter, "eval_accuracy_ratio")) == (1.25, 0.75)
    assert value(exporter, "eval_score") == 0.5


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
    exporter.beat(MEMBERS, STATE)
    now[0] += 29
    status, text = get(port, "/health")
    assert (status, json.loads(text)) == (200, {"run": "r", "ok": True, "seconds_since_last_turn": 29.0})
    now[0] += 2
    status, text = get(port, "/health")
    assert status == 503 and json.loads(text)["ok"] is False
    exporter.beat(MEMBERS, STATE)
    assert get(port, "/health")[0] == 200


def test_metrics_are_served_until_closed() -> None:
    exporter = Exporter("r", "m", 7)
    port = exporter.serve(0)
    assert 'zoray_max_steps{run="r"} 7.0' in get(port, "/metrics")[1]
    exporter.close()
    with pytest.raises(urllib.error.URLError):
        get(port, "/metrics")


def test_what_is_not_known_yet_is_not_there(exporter: Exporter) -> None:
    """A loss of 0 would be the best there ever was."""
    names = (
        *("loss", "eval_loss", "eval_accuracy_ratio", "eval_score", "learning_rate"),
        *("projected_gradient_rms", "gradient_noise_ratio", "step_factor"),
    )
    assert [value(exporter, name) for name in names] == [None] * len(names)
    exporter.evaluated(Evaluation(1.25, 0.1, 8, 6))
    exporter.committed(record(4), Split(), 1.0)
    assert None not in [value(exporter, name) for name in names]


def test_what_becomes_of_replicas_is_counted_from_the_start(exporter: Exporter) -> None:
    events = ("started", "joined", "left", "lost")
    assert [value(exporter, "replica_events_total", event=event) for event in events] == [0, 0, 0, 0]
    for event in ("started", "started", "lost"):
        exporter.changed(event)  # type: ignore[arg-type]
    assert [value(exporter, "replica_events_total", event=event) for event in events] == [2, 0, 0, 1]


def test_data_parallel_would_have_sent_two_bytes_per_weight_step_and_replica(exporter: Exporter) -> None:
    for step in range(3):
        exporter.committed(record(step), Split(), 1.0, 2 * 1000)
    # Two replicas took part in each.
    assert value(exporter, "data_parallel_bytes_total") == 3 * 2 * 2 * 1000


def test_the_time_of_the_last_commit_is_that_of_the_start_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.0)
    made = Exporter("r", "m", 7)
    assert value(made, "last_commit_timestamp_seconds") == 1000.0
    monkeypatch.setattr("time.time", lambda: 1007.0)
    made.committed(record(0), Split(), 1.0)
    assert value(made, "last_commit_timestamp_seconds") == 1007.0


def test_lag_and_memory_are_those_of_the_replicas_there_are(exporter: Exporter) -> None:
    members = {"r0": Member(held=5), "r1": Member(held=2)}
    exporter.beat(MEMBERS, replace(STATE, step=5, members=members))
    for name in members:
        exporter.weighed(name, {"resident": 100, "peak": 200})
    assert [value(exporter, "replica_lag_steps", replica=name) for name in members] == [0, 3]
    assert value(exporter, "replica_memory_bytes", replica="r1", kind="peak") == 200
    exporter.beat(MEMBERS, replace(STATE, step=6, members={"r1": Member(held=6)}))
    assert [value(exporter, "replica_lag_steps", replica=name) for name in members] == [None, 0]
    assert value(exporter, "replica_memory_bytes", replica="r0", kind="peak") is None
    exporter.weighed("r1", {"resident": 50})
    assert value(exporter, "replica_memory_bytes", replica="r1", kind="peak") is None
    own = value(exporter, "coordinator_memory_bytes")
    assert own is not None and own > 1e6


def test_replicas_are_asked_for_their_memory_only_when_somebody_looks(exporter: Exporter) -> None:
    assert not exporter.scraped()
    port = exporter.serve(0)
    get(port, "/health")
    assert not exporter.scraped()
    get(port, "/metrics")
    assert exporter.scraped()
    assert not exporter.scraped()
