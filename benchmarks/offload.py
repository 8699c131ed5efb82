"""One device, weights elsewhere: streamed against ZeRO-3's offload: python -m benchmarks.offload [--quick].

OPT-125M, one thread, the processor as the device: a step is one probe and an update of sixteen directions. Each kind of
memory is measured in processes of its own, in turn, since DeepSpeed keeps what it knows of modules for a whole process.
Peaks are bytes of tensors that the main thread made, weights in memory included: here that is the device's too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.bytes import Peak
from benchmarks.common import Row, opt_125m, opt_batch, seconds, write_section
from benchmarks.memory import spread

KINDS = ("resident", "zero3-cpu", "streamed-cpu", "zero3-nvme", "streamed-nvme")
DTYPES = ("float32", "bfloat16")
STEPS, ROUNDS = 3, 3
BUFFER = 40_000_000
"""Weights in each of the five buffers that DeepSpeed has for files, in memory that it does not have from torch."""


def child(kind: str, dtype: str, folder: Path) -> None:
    """Load the model, take some steps, and print what they took."""
    from torch import distributed
    from transformers import AutoModelForCausalLM

    from zoray.aggregate import ProbeResult, commit
    from zoray.memory import Resident
    from zoray.memory.spill import streamed_loading
    from zoray.memory.streamed import Streamed, Streaming
    from zoray.memory.zero3 import Sharding, Zero3, partitioned_loading
    from zoray.replica import Replica

    torch.set_num_threads(1)
    backend, _, place = kind.partition("-")
    files = folder / kind if place == "nvme" else None
    (folder / kind).mkdir(exist_ok=True)
    batch, width = opt_batch(), getattr(torch, dtype)
    memory: Any = Resident
    with Peak() as tensors:
        with ExitStack() as stack:
            if backend == "zero3":
                distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
                sharding = Sharding(place, files, buffer=BUFFER)  # type: ignore[arg-type]
                memory = partial(Zero3, sharding=sharding)
                stack.enter_context(partitioned_loading(width, sharding))
            elif backend == "streamed":
                streaming = Streaming(place, files)  # type: ignore[arg-type]
                memory = partial(Streamed, streaming=streaming)
                stack.enter_context(streamed_loading(streaming))
            model: Any = AutoModelForCausalLM.from_pretrained(folder / dtype, dtype=width)
        replica = Replica(model, memory=memory)
        loading, tensors.peak = tensors.peak, tensors.now
        replica.prove({name: values[:2, :16] for name, values in batch.items()})
        replica.probe(0, 0, batch, 1e-3)
    found: dict[str, list[float]] = {"step": [], "work": [], "probe": [], "update": []}

    def update(at: int) -> None:
        # The coefficients of sixteen directions; which they are does not matter to the time.
        replica.apply(commit(at, [ProbeResult(at, k, 0, 1.0 + k, 1.0) for k in range(16)], learning_rate=1e-9))

    def step(at: int) -> None:
        replica.probe(at, 0, batch, 1e-3)
        update(at)

    def update_at_once(at: int) -> None:
        update(at)
        if isinstance(replica.memory, Streamed):
            replica.memory.flush()

    for at in range(STEPS):
        work = time.process_time()
        found["step"].append(seconds(partial(step, at)))
        found["work"].append(time.process_time() - work)
    for at in range(STEPS, 2 * STEPS):
        found["update"].append(seconds(partial(update_at_once, at)))
        found["probe"].append(seconds(partial(replica.probe, at, 0, batch, 1e-3)))
    # The first of each warms up.
    times = {name: statistics.median(values[1:]) for name, values in found.items()}
    print(json.dumps(times | {"loading": loading / 2**20, "peak": tensors.peak / 2**20}))


def measure(kind: str, dtype: str, folder: Path) -> dict[str, float]:
    """Figures of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.offload", "--folder", str(folder), "--child", kind, "--dtype", dtype]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300).stdout
    facts: dict[str, float] = json.loads(output.splitlines()[-1])
    return facts


def main() -> None:
    """Measure and write the sections `offload_float32` and `offload_bfloat16` of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, help="one of the two sections")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.dtype, options.folder)
        return
    # Not where temporary files are in memory.
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as name:
        folder = Path(name)
        for dtype in DTYPES if options.dtype is None else [options.dtype]:
            opt_125m().to(getattr(torch, dtype)).save_pretrained(folder / dtype)
            count = 1 if options.quick else ROUNDS
            rounds = [{kind: measure(kind, dtype, folder) for kind in KINDS} for _ in range(count)]
            title = f"Weights elsewhere, {dtype}"
            write_section(f"offload_{dtype}", title, "python -m benchmarks.offload", figures(dtype, rounds))


def figures(dtype: str, rounds: list[dict[str, dict[str, float]]]) -> list[Row]:
    """The rows of a section.

    Args:
        dtype: for the README, which has them all in one table.
        rounds: the figures of each kind, by its name, in each round.
    """

    def ratio(kind: str, other: str, name: str) -> str:
        each = [found[kind][name] / found[other][name] for found in rounds]
        mine, theirs = (median(one, name) * 1e3 for one in (kind, other))
        return f"{spread(each)}; {mine:,.0f} ms / {theirs:,.0f} ms"

    def median(kind: str, name: str) -> float:
        return statistics.median(found[kind][name] for found in rounds)

    rows = []
    for name, figure in {"step": "step", "work": "processor time of a step"}.items():
        rows += [
            Row(f"{dtype}: {figure}, {kind} / resident", ratio(kind, "resident", name), "reported", None)
            for kind in KINDS[1:]
        ]
    for place in ("cpu", "nvme"):
        mine = f"streamed-{place}"
        rows.append(
            Row(f"{dtype}: step, {mine} / zero3-{place}", ratio(mine, f"zero3-{place}", "step"), "reported", None)
        )
        each = [found[mine]["step"] / (found[mine]["probe"] + found[mine]["update"]) for found in rounds]
        rows.append(Row(f"{dtype}: step of {mine} / the same, updated at once", spread(each), "reported", None))
    for name, figure in {"peak": "a probe", "loading": "loading"}.items():
        text = ", ".join(f"{kind} {median(kind, name):,.0f} MiB" for kind in KINDS)
        text += (
            f"; and {5 * BUFFER * getattr(torch, dtype).itemsize / 2**20:,.0f} MiB of DeepSpeed's own for zero3-nvme"
        )
        rows.append(Row(f"{dtype}: peak of tensors in {figure}", text, "reported", None))
    return rows


if __name__ == "__main__":
    main()
