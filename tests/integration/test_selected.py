"""Runs that train some of the weights, on a real Ray; a replica that joins in mid-run changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.conftest import Inputs, Launch
from tests.integration.test_elastic import check_whole, scale_and_wait, when

KINDS: dict[str, dict[str, Any]] = {
    "prefix": {"trainable": {"prefix": {"num_virtual_tokens": 3}}, "epsilon": 0.1, "learning_rate": 0.1},
    "bias_and_norm": {"trainable": "bias_and_norm"},
    "sparse": {"trainable": {"sparse": {"sparsity": 0.75}}, "dtype": "bfloat16", "weight_decay": 0.1},
    "blocks": {"trainable": {"blocks": {"count": 2, "steps": 2}}},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_replica_joins_in_mid_run(warm: None, name: str, inputs: Inputs, launch: Launch, joined: list[int]) -> None:
    """One by replay from the base model, and one from a snapshot, both compared with one that was there all along."""
    keys = {"max_steps": 9, "eval_steps": None, "eval_on_start": False, "replicas": 1, **KINDS[name]}
    alone = launch(inputs.config(**keys))
    assert alone.finish.reason == "done"
    saving = {"save_steps": 5, "save_total_limit": 1}
    ran = launch(inputs.config(**keys, **saving), at=when({3: scale_and_wait(2), 7: scale_and_wait(3)}))
    check_whole(ran, alone)
    assert joined == [0, 0, 0, 5]
    assert ran.coordinator.state.counters.diverged == 0
    assert all(member.proven for member in ran.coordinator.state.members.values())
