"""What each estimator's probe takes on an OPT-125M shape, against two-sided SPSA: python -m benchmarks.estimators.

One thread, float32, 8 sequences of 64 tokens. Memory is that of the tensors that a probe makes, at its peak, beside the
weights. The error of differences is against the exact slope along the same directions.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, get_args

import torch

from benchmarks.common import Row, in_turn, opt_125m, opt_batch, write_section
from zoray.aggregate import ProbeResult
from zoray.estimators import EstimatorName
from zoray.planning.live import Peak
from zoray.replica import Replica

EPSILON = 1e-3
Probe = Callable[[int], ProbeResult]
"""Runs the probe of a direction."""

CASES: tuple[tuple[str, EstimatorName, dict[str, Any], bool], ...] = (
    ("spsa, signs in two forwards", "spsa", {"signs": "sequential"}, False),
    ("one_sided, the first direction of a batch", "one_sided", {}, False),
    ("one_sided, each further one", "one_sided", {}, True),
    ("forward_gradient", "forward_gradient", {}, False),
    ("forward_gradient, dense directions", "forward_gradient", {"direction": "rademacher"}, False),
    ("backprop, the first direction of a batch", "backprop", {}, False),
    ("backprop, each further one", "backprop", {}, True),
)
"""Words, estimator, options of the replica, and whether an earlier direction was probed on the same batch."""


def main() -> None:
    """Measure and write the section `estimators` of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one pair")
    pairs = 1 if parser.parse_args().quick else 5
    torch.set_num_threads(1)
    model, batch, fresh = opt_125m(), opt_batch(), count(100)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    replicas: dict[str, Replica] = {}

    def prober(name: EstimatorName, options: dict[str, Any], again: bool) -> Probe:
        key = f"{name} {options}"
        if key not in replicas:
            replicas[key] = Replica(model, estimator=name, **options)
            replicas[key].prove(batch)
        replica = replicas[key]

        def probe(direction: int) -> ProbeResult:
            if not again:
                # As if another batch had been probed before.
                replica._forget()
            return replica.probe(0, direction, batch, EPSILON)

        return probe

    def peak(probe: Probe) -> str:
        """Bytes that a probe makes, and what share of the weights they are."""
        probe(0)
        with Peak() as found:
            probe(1)
        return f"{found.peak / 2**20:,.0f} MiB; {found.peak / weights:.2f} of the weights"

    spsa = prober("spsa", {}, False)
    rows = [Row("tensors of a probe, spsa with both signs in one forward", peak(spsa), "reported", None)]
    for words, name, options, again in CASES:
        probe = prober(name, options, again)
        rows.append(Row(f"tensors of a probe, {words}", peak(probe), "reported", None))
        ratio = in_turn(partial(_next, probe, fresh), partial(_next, spsa, fresh), pairs)
        rows.append(Row(f"probe of {words} / of spsa with both signs in one forward", str(ratio), "reported", None))
    rows += errors({name: prober(name, {}, True) for name in get_args(EstimatorName)})
    write_section("estimators", "Estimators", "python -m benchmarks.estimators", rows)


def _next(probe: Probe, fresh: Iterator[int]) -> None:
    probe(next(fresh))


def errors(probes: dict[EstimatorName, Probe]) -> list[Row]:
    """How far each is from the exact slope, over a few directions, relative to its root mean square."""
    found = {name: [probe(k).projected_gradient for k in range(6)] for name, probe in probes.items()}
    exact = found.pop("backprop")
    size = statistics.fmean(g * g for g in exact) ** 0.5
    rows = []
    for name, slopes in found.items():
        error = statistics.fmean((g - e) ** 2 for g, e in zip(slopes, exact, strict=True)) ** 0.5
        text = f"{error / size:.2g} of {size:.3g}"
        rows.append(Row(f"error of the slope, {name}, epsilon {EPSILON:g}, 6 directions", text, "reported", None))
    return rows


if __name__ == "__main__":
    main()
