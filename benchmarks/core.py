"""Speed of the core on an OPT-125M shape (float32, 8 sequences of 64 tokens): python -m benchmarks.core [--quick].

Directions are those of a run's defaults.
"""

from __future__ import annotations

import argparse
from itertools import count

import numpy as np
import torch

from benchmarks.common import Ratio, Row, in_turn, opt_125m, opt_batch, write_section
from benchmarks.mezo import mezo_step, regenerate
from zoray.commits import Commit, seal
from zoray.replica import Replica


def commits(start: int, steps: int, directions: int) -> list[Commit]:
    """Commits of random coefficients; eta is too small to matter and too large to vanish."""
    random = np.random.default_rng(start)
    eta = float(np.float32(1e-12))
    made = []
    for step in range(start, start + steps):
        terms = tuple((step, k, int(c)) for k, c in enumerate(random.integers(-127, 128, directions)))
        made.append(seal(step, eta, 1.0, 1.0, terms, bytes(32)))
    return made


def main() -> None:
    """Measure and write the section `core` of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two pairs, for trying the script out")
    pairs = 2 if parser.parse_args().quick else 5
    model, batch = opt_125m(), opt_batch()
    replica = Replica(model, direction="inputs")
    verdict = replica.prove(batch)
    fresh = count()

    def plain() -> None:
        with torch.no_grad():
            for _ in range(2):
                model(**batch, use_cache=False)

    def probe() -> None:
        replica.probe(next(fresh), 0, batch, 1e-3)

    def step() -> None:
        replica.probe(next(fresh), 0, batch, 1e-3)
        replica.apply(commits(replica.step, 1, 1))

    def apply(directions: int) -> None:
        replica.apply(commits(replica.step, 1, directions))

    rows = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        label = f"{threads} thread{'s' if threads > 1 else ''}"
        ratio = in_turn(step, plain, pairs)
        rows.append(
            Row(f"step of 1 direction / its two plain forwards, {label}", str(ratio), "≤ 1.05", ratio.median <= 1.05)
        )
        ratio = in_turn(lambda: mezo_step(model, batch, next(fresh), 1e-3, 1e-12), plain, pairs)
        rows.append(Row(f"MeZO's step / its two plain forwards, {label}", str(ratio), "reported", None))
    torch.set_num_threads(2)
    ratio = in_turn(lambda: apply(64), probe, pairs)
    rows.append(Row("applying 64 directions / one probe, 2 threads", str(ratio), "≤ 0.05", ratio.median <= 0.05))
    ratio = in_turn(lambda: regenerate(model, range(4), 1e-12), probe, pairs)
    scaled = Ratio([16 * a for a in ratio.a], ratio.b)
    rows.append(
        Row("regenerating 64 Gaussian directions / one probe (4 timed, × 16), 2 threads", str(scaled), "reported", None)
    )
    rows.append(replay(replica, probe, 16, pairs))
    rows.append(replay(replica, probe, 1, pairs))
    print(verdict)
    write_section("core", "The core", "python -m benchmarks.core", rows)


def replay(replica: Replica, probe: object, directions: int, pairs: int) -> Row:
    """Replay of a step within a stretch of 32, against the probes of running it: one is timed, and counted for each."""
    stretch = 32

    def many() -> None:
        replica.apply(commits(replica.step, stretch, directions))

    def one() -> None:
        probe()  # type: ignore[operator]

    timed = in_turn(many, one, pairs)
    ratio = Ratio([a / stretch for a in timed.a], [b * directions for b in timed.b])
    return Row(
        f"replay of a step, directions: {directions} / its probes (one timed, × {directions}), 2 threads",
        str(ratio),
        "≤ 0.01",
        ratio.median <= 0.01,
    )


if __name__ == "__main__":
    main()
