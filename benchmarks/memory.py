"""Peak memory of a probe against plain inference of the same 2B rows: python -m benchmarks.memory [--quick].

Each is measured in a process of its own, as the kernel accounts it (VmHWM): after the model is made, and after four
calls.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common import Row, opt_125m, opt_batch, write_section


def peak() -> float:
    """Largest resident size of this process so far, MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def child(kind: str) -> None:
    """Do one kind of work and print the peak before and after."""
    import torch

    from zoray.replica import Replica

    torch.set_num_threads(1)
    model, batch = opt_125m(), opt_batch()
    if kind == "plain":
        rows = {key: torch.cat([value, value]) for key, value in batch.items()}
        before = peak()
        for _ in range(4):
            with torch.no_grad():
                model(**rows, use_cache=False)
    else:
        before = peak()
        replica = Replica(model, signs="batched" if kind == "proved" else "auto")
        for step in range(4):
            replica.probe(step, 0, batch, 1e-3)
            if kind == "step":
                import zoray

                probes = [replica.probe(step, 0, batch, 1e-3)]
                replica.apply(zoray.commit(step, probes, learning_rate=1e-9))
    print(before, peak())


def measure(kind: str) -> tuple[float, float]:
    """(peak before the work, peak after), MiB, of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = (float(word) for word in done.stdout.split()[-2:])
    return before, after


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
        whole = statistics.median(a[1] / b[1] for a, b in pairs)
        above = statistics.median((a[1] - a[0]) / (b[1] - b[0]) for a, b in pairs)
        a, b = pairs[0]
        text = f"{whole:.3f}; {a[1]:,.0f} MiB / {b[1]:,.0f} MiB; above the loaded model {above:.2f}"
        rows.append(Row(f"peak memory, {words} / plain inference of the same 2B rows", text, "≤ 1.05", whole <= 1.05))
    write_section("memory", "Memory", "python -m benchmarks.memory", rows)


if __name__ == "__main__":
    main()
