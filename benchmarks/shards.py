"""A replica in two ZeRO-3 processes against two resident ones: python -m benchmarks.shards [--quick] [--part PART].

OPT-125M in float32, one thread a process; both pairs do the same two probes at once. Each pair is measured in processes
of its own, in turn. Peaks are bytes of tensors: the kernel's figure has the checkpoint's mapped pages in it, and what
the C library keeps of memory that was freed. What loading takes is measured once more with a deep model: a third of
OPT-125M is one module, its embedding, which hides that a process holds no more than its parts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.bytes import Peak
from benchmarks.common import Row, opt_125m, opt_batch, seconds, write_section
from benchmarks.memory import spread

SHARDS, STEPS = 2, 3
LOADED_BY = (1, 2, 4)
"""How many processes load the deep model."""


def deep_model() -> Any:
    """A randomly initialised Llama of 24 layers and 78M parameters, float32; no module is 1/100 of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, max_position_embeddings=512, **sizes)).eval()


def load(rank: int, size: int, folder: Path) -> None:
    """Load the deep model as one of `size` processes, and print the peak of that."""
    from torch import distributed
    from transformers import AutoModelForCausalLM

    from zoray.memory.zero3 import Zero3, partitioned_loading
    from zoray.replica import Replica

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/load", rank=rank, world_size=size)
    with Peak() as loading:
        with partitioned_loading(torch.float32):
            model: Any = AutoModelForCausalLM.from_pretrained(folder / "deep", dtype=torch.float32)
        Replica(model, memory=Zero3)
    print(json.dumps({"peak": loading.peak / 2**20, "kept": loading.now / 2**20}))
    distributed.barrier()
    distributed.destroy_process_group()


def child(kind: str, rank: int, folder: Path) -> None:
    """Load the model, take some steps, and print what they took."""
    from torch import distributed
    from transformers import AutoModelForCausalLM

    from zoray.aggregate import commit
    from zoray.memory import Resident
    from zoray.memory.zero3 import Zero3, partitioned_loading
    from zoray.replica import Replica

    torch.set_num_threads(1)
    # The resident processes form a world too, to begin each step together.
    distributed.init_process_group("gloo", init_method=f"file://{folder}/{kind}", rank=rank, world_size=SHARDS)
    batch = opt_batch()
    with Peak() as loading:
        with partitioned_loading(torch.float32) if kind == "zero3" else nullcontext():
            model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        replica = Replica(model, memory=Zero3 if kind == "zero3" else Resident)
    replica.prove(batch)
    found: dict[str, list[float]] = {"probe": [], "update": [], "gather": []}
    for step in range(STEPS + 1):
        distributed.barrier()
        found["probe"].append(seconds(lambda at=step: replica.probe(at, 0, batch, 1e-3, rank)))  # type: ignore[misc]
        probes = [replica.probe(step, 0, batch, 1e-3)]
        # The coefficients of sixteen directions; which they are does not matter to the time.
        wide = [type(probes[0])(step, k, 0, probes[0].projected_gradient + k, probes[0].loss) for k in range(16)]
        update = commit(step, wide, learning_rate=1e-9)
        distributed.barrier()
        found["update"].append(seconds(lambda made=update: replica.apply(made)))  # type: ignore[misc]
        distributed.barrier()
        if kind == "zero3":
            found["gather"].append(seconds(lambda: _gather_all(model)))
    # The first of each warms up.
    times = {name: statistics.median(values[1:]) for name, values in found.items() if values}
    with Peak() as probing:
        replica.probe(STEPS + 1, 0, batch, 1e-3, rank)
    sizes = {"loading": loading.peak, "peak": loading.now + probing.peak}
    print(json.dumps(times | {name: size / 2**20 for name, size in sizes.items()}))
    distributed.barrier()
    distributed.destroy_process_group()


def _gather_all(model: Any) -> None:
    """Every all-gather of a forward and nothing else."""
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        for parameter in parameters:
            parameter.all_gather()
        for parameter in parameters:
            parameter.partition()


def measure(kind: str, folder: Path, size: int = SHARDS) -> dict[str, float]:
    """Figures of the slower, or larger, of so many fresh processes."""
    (folder / kind).unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.shards", "--folder", str(folder), "--child", kind]
    command += ["--size", str(size), "--rank"]
    processes = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(size)]
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    facts = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {name: max(fact[name] for fact in facts) for name in facts[0]}


def main() -> None:
    """Measure and write the sections `shards` and `loading` of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one pair")
    parser.add_argument("--part", choices=("shards", "loading"), help="one of the two sections")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "load":
        load(options.rank, options.size, options.folder)
    elif options.child:
        child(options.child, options.rank, options.folder)
    else:
        with tempfile.TemporaryDirectory() as name:
            if options.part != "loading":
                steps(Path(name), 1 if options.quick else 5)
            if options.part != "shards":
                loading(Path(name))


def steps(folder: Path, count: int) -> None:
    """Measure that many pairs, and write the section `shards`."""
    model = opt_125m()
    model.save_pretrained(folder / "model")
    weights, layer = sizes_of(model)
    del model
    pairs = [(measure("zero3", folder), measure("resident", folder)) for _ in range(count)]
    write_section("shards", "Shards", "python -m benchmarks.shards", figures(pairs, weights, layer))


def loading(folder: Path) -> None:
    """Load the deep model with so many processes each, and write the section `loading`."""
    model = deep_model()
    model.save_pretrained(folder / "deep")
    weights, module = sizes_of(model)
    layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters()) / 2**20
    del model
    rows = []
    for size in LOADED_BY:
        found = measure("load", folder, size)
        text = f"{found['peak'] / weights:.3f}; {found['peak']:,.1f} MiB / {weights:,.1f} MiB, and {found['kept']:,.1f}"
        text += f" MiB once it is loaded; a layer {layer:,.1f} MiB, the largest module {module:,.1f} MiB"
        figure = f"peak of loading a deep model, one of {size} processes / all weights"
        if size == 1:
            rows.append(Row(figure.replace("processes", "process"), text, "reported", None))
            continue
        most = 1 / size + layer / weights
        rows.append(Row(figure, text, f"≤ 1/{size} + one layer = {most:.3f}", found["peak"] <= most * weights))
    write_section("loading", "Loading in parts", "python -m benchmarks.shards", rows)


def sizes_of(model: Any) -> tuple[float, float]:
    """Of all weights, and of those of the largest module, MiB."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    module = max(sum(p.numel() * p.element_size() for p in m.parameters(recurse=False)) for m in model.modules())
    return weights / 2**20, module / 2**20


def figures(pairs: list[tuple[dict[str, float], dict[str, float]]], weights: float, layer: float) -> list[Row]:
    """The rows of the page.

    Args:
        pairs: of the sharded and of the resident processes.
        weights, layer: of the model and of its largest module, MiB.
    """

    def ratio(name: str, unit: float = 1e3, word: str = "ms") -> tuple[float, str]:
        each = [a[name] / b[name] for a, b in pairs]
        mine, theirs = (statistics.median(pair[i][name] for pair in pairs) * unit for i in (0, 1))
        return statistics.median(each), f"{spread(each)}; {mine:,.0f} {word} / {theirs:,.0f} {word}"

    gathers = statistics.median(a["gather"] for a, _ in pairs)
    extra = statistics.median(a["probe"] - b["probe"] for a, b in pairs)
    update, peak, loading = ratio("update"), ratio("peak", 1, "MiB"), ratio("loading", 1, "MiB")
    within = all(b["peak"] - a["peak"] >= weights * (1 - 1 / SHARDS) - layer for a, b in pairs)
    text = f"{peak[1]}; weights {weights:,.0f} MiB, largest module {layer:,.0f} MiB"
    return [
        Row("peak of a probe, one of 2 shards / resident", text, "≤ resident − weights/2 + one module", within),
        Row("peak of loading, one of 2 shards / resident", loading[1], "reported", None),
        Row("probe of 2 shards, each its own / of 2 resident replicas", ratio("probe")[1], "reported", None),
        Row(
            "of which the difference; all all-gathers of a forward alone",
            f"{extra * 1e3:,.0f} ms; {gathers * 1e3:,.0f} ms",
            "explained by them",
            None,
        ),
        Row("update of 16 directions, one of 2 shards / resident", update[1], "≤ 0.55", update[0] <= 0.55),
    ]


if __name__ == "__main__":
    main()
