"""Every estimator on a real Ray: who computes what changes nothing, and all go the same way."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from tests.integration.conftest import Inputs, Launch, Ran
from zoray.config import EstimatorName
from zoray.errors import ConfigError
from zoray.ledger import Ledger
from zoray.protocol import Kind

NAMES = get_args(EstimatorName)
KEYS: dict[str, Any] = {
    "directions_per_batch": 6, "microbatches": 2, "directions": 6, "max_steps": 3, "eval_steps": None, "epsilon": 1e-4,
}  # fmt: skip


def first(ran: Ran) -> list[float]:
    """The projected gradients of the first step, as its commit has them: up to a factor, within 1 in 127."""
    return [
        float(coefficient)
        for _, _, coefficient in next(iter(Ledger.open(ran.folder.ledger, repair=False).commits())).terms
    ]


def test_the_ledger_is_that_of_one_replica(warm: None, inputs: Inputs, launch: Launch) -> None:
    found, kinds = {}, dict[str, set[Kind]]()
    for name in NAMES:
        seen = kinds.setdefault(name, set())

        def note(coordinator: Any, _: object, seen: set[Kind] = seen) -> None:
            seen.update(item.kind for item in coordinator.state.work)

        alone = launch(inputs.config(replicas=1, estimator=name, **KEYS), at=note)
        three = launch(inputs.config(replicas=3, estimator=name, **KEYS))
        assert alone.finish.reason == three.finish.reason == "done"
        assert (alone.ledger, alone.finish.digest) == (three.ledger, three.finish.digest)
        assert three.coordinator.state.counters.diverged == three.coordinator.state.counters.failed == 0
        found[name] = first(alone)
    probing = {name: {kind for kind in of if kind.probing} for name, of in kinds.items()}
    assert probing == {name: {Kind.PROBE} for name in NAMES} | {"one_sided": {Kind.PLUS, Kind.CENTRE}}
    for name in NAMES:
        assert np.corrcoef(found[name], found["backprop"])[0, 1] > (0.9 if name == "one_sided" else 0.98), name
    assert np.abs(np.subtract(found["forward_gradient"], found["backprop"])).max() <= 1


def test_weights_cannot_be_put_elsewhere_in_mid_run(warm: None, inputs: Inputs, launch: Launch) -> None:
    refused: list[str] = []

    def ask(coordinator: Any, _: object) -> None:
        with pytest.raises(ConfigError, match="all in one place") as caught:
            coordinator.scale(2, "{kind: streamed}")
        refused.append(str(caught.value))

    assert launch(inputs.config(replicas=1, estimator="backprop", **KEYS), at=ask).finish.reason == "done"
    assert refused
