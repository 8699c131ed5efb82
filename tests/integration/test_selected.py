"""Runs that train some of the weights, on a real Ray; a replica that joins in mid-run changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from launch.restore import base_replica
from tests.integration.conftest import Inputs, Launch
from tests.integration.test_elastic import scale_and_wait, when
from zoray.ledger import Ledger
from zoray.snapshot import replay

KINDS: dict[str, dict[str, Any]] = {
    "prefix": {"trainable": {"prefix": {"num_virtual_tokens": 3}}, "epsilon": 0.1, "learning_rate": 0.1},
    "bias_and_norm": {"trainable": "bias_and_norm"},
    "sparse": {"trainable": {"sparse": {"sparsity": 0.75}}, "dtype": "bfloat16", "weight_decay": 0.1},
    "blocks": {"trainable": {"blocks": {"count": 2, "steps": 2}}},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_replica_joins_in_mid_run(warm: None, name: str, inputs: Inputs, launch: Launch, joined: list[int]) -> None:
    """One by replay from the base model, one from a snapshot; and all of it once more by replay in this process."""
    keys = {"max_steps": 9, "eval_steps": None, "eval_on_start": False, "replicas": 1, **KINDS[name]}
    saving = {"save_steps": 5, "save_total_limit": 1}
    ran = launch(inputs.config(**keys, **saving), at=when({3: scale_and_wait(2), 7: scale_and_wait(3)}))
    assert ran.finish.reason == "done", ran.finish
    assert joined == [0, 0, 5]
    assert ran.coordinator.state.counters.diverged == 0
    assert all(member.proven for member in ran.coordinator.state.members.values())
    with Ledger.open(ran.folder.ledger, repair=False) as ledger:
        replica = base_replica(ran.folder.config(), ledger)
        base = replica.digest()
        replay(replica, ledger, None)
    assert base != replica.digest() == ran.finish.digest
