"""Peak memory of a probe against plain inference of the same 2B rows: python -m benchmarks.memory [--quick].

Each is measured in a process of its own, as the kernel accounts it: what is resident once the model is made (VmRSS),
and the peak over the whole life of the process (VmHWM), after four calls.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common import Row, opt_125m, opt_batch, write_section


def resident(field: str) -> float:
    """Resident size of this process in MiB: `VmRSS` now, `VmHWM` at its largest so far."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def child(kind: str) -> None:
    """Do one kind of work and print the resident size before it and the peak."""
    import torch

    import zoray
    from zoray.replica import Replica

    torch.set_num_threads(1)
    model, batch = opt_125m(), opt_batch()
    if kind == "plain":
        rows = {key: torch.cat([value, value]) for key, value in batch.items()}
        before = resident("VmRSS")
        for _ in range(4):
            with torch.no_grad():
                model(**rows, use_cache=False)
    else:
        before = resident("VmRSS")
        replica = Replica(model)
        for step in range(4):
            probes = [replica.probe(step, 0, batch, 1e-3)]
            if kind == "step":
                replica.apply(zoray.commit(step, probes, learning_rate=1e-9))
    print(before, resident("VmHWM"))


def measure(kind: str) -> tuple[float, float]:
    """(resident before the work, peak), MiB, of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = (float(word) for word in done.stdout.split()[-2:])
    return before, after


def spread(ratios: list[float]) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def main() -> None:
    """Measure and write the section `memory` of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one pair")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    rows = []
    for kind, words in (("probe", "probes with their proof at start"), ("step", "whole steps")):
        pairs = [(measure(kind), measure("plain")) for _ in range(1 if options.quick else 5)]
        ratios = [a[1] / b[1] for a, b in pairs]
        above = [(a[1] - a[0]) / (b[1] - b[0]) for a, b in pairs]
        whole = statistics.median(ratios)
        sizes = [statistics.median(column) for column in zip(*(a + b for a, b in pairs), strict=True)]
        text = (
            f"{spread(ratios)}; {sizes[1]:,.0f} MiB / {sizes[3]:,.0f} MiB; above the loaded model {spread(above)}; "
            f"{sizes[1] - sizes[0]:,.0f} MiB / {sizes[3] - sizes[2]:,.0f} MiB"
        )
        rows.append(Row(f"peak memory, {words} / plain inference of the same 2B rows", text, "≤ 1.05", whole <= 1.05))
    write_section("memory", "Memory", "python -m benchmarks.memory", rows)


if __name__ == "__main__":
    main()
