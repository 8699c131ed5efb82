from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import pytest

from actors.exporter import Exporter
from actors.lookup import Lookup
from zoray.errors import ResourceError
from zoray.protocol import initial_state
from zoray.protocol.machines import Policy
from zoray.protocol.membership import initial_membership
from zoray.protocol.state import Settings

MEMBERS = initial_membership(Policy(1, None), 2)
STATE = initial_state(Settings(max_steps=7, directions=2, learning_rate=lambda step: 0.5), 0, bytes(32))
PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented() -> dict[str, tuple[str, tuple[str, ...]]]:
    rows = re.findall(r"^\| `(zoray_\w+)` \| (\w+) \| ([^|]*)\|", PAGE.read_text(), re.MULTILINE)
    return {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def exported() -> dict[str, tuple[str, tuple[str, ...]]]:
    exporter = Exporter("r", "m", 3)
    found = {}
    for collector in exporter.registry._collector_to_names:
        if isinstance(collector, Lookup):
            families = [(family.name, family.type, tuple(family._labelnames)) for family in collector.describe()]
        else:
            families = [(collector._name, collector._type, tuple(collector._labelnames))]
        for name, kind, labels in families:
            assert labels[0] == "run"
            found[name + ("_total" if kind == "counter" else "")] = (kind, labels[1:])
    return found


def test_names_types_and_labels_are_those_of_the_documentation() -> None:
    assert exported() == documented()
    assert len(exported()) >= 15


def test_counters_name_their_unit_and_end_in_total() -> None:
    for name, (kind, _) in exported().items():
        assert name.endswith("_total") == (kind == "counter"), name
        if kind == "histogram":
            assert name.endswith("_seconds"), name


def test_every_kind_of_fault_is_documented_and_exported_from_the_start() -> None:
    from prometheus_client import generate_latest

    text = generate_latest(Exporter("r", "m", 3).registry).decode()
    row = next(line for line in PAGE.read_text().splitlines() if "`zoray_faults_total`" in line)
    for kind in re.findall(r'zoray_faults_total\{kind="(\w+)"', text):
        assert f"`{kind}`" in row
    assert 'kind="diverged",run="r"} 0.0' in text
    assert "_created" not in text


def test_metrics_and_health_are_served_and_a_taken_port_is_refused() -> None:
    exporter = Exporter("r", "m", 3)
    port = exporter.serve(0)
    try:
        exporter.beat(MEMBERS, STATE)
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        assert 'zoray_replicas{run="r",state="active"} 0.0' in text and 'zoray_target_replicas{run="r"} 2.0' in text
        health = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).read())
        assert health["ok"] is True
        with pytest.raises(ResourceError, match=str(port)) as caught:
            Exporter("s", "m", 3).serve(port)
        assert caught.value.exit_code == 7
    finally:
        exporter.close()
