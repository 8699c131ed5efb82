"""What `zoray plan` says against what a replica takes: python -m benchmarks.plan [--quick].

Each case runs in processes of its own, which load a model, prove the paths, probe, evaluate, replay 64 commits of 16
directions and digest. Tensors are counted as the operations make them; what the kernel gives a process is its anonymous
and shared memory, looked at every 5 ms from outside, without pages of files.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bytes import Peak
from benchmarks.common import Row, opt_125m, write_section
from benchmarks.memory import spread

WITHIN = 0.15


@dataclass(frozen=True)
class Case:
    """A model, and how its replica works."""

    model: str
    dtype: str = "float32"
    shards: int = 1
    offload: str = "none"
    signs: str = "auto"

    def config(self, folder: Path) -> Any:
        """The run's configuration."""
        from zoray.config import RunConfig

        kind = "classification" if self.model == "bert" else "causal_lm"
        task: dict[str, Any] = {"kind": kind, "train": "train", "eval": "eval", "max_length": 64}
        if kind == "classification":
            task["num_labels"] = 2
        keys: dict[str, Any] = {"model": str(folder / self.model), "max_steps": 1, "task": task, "dtype": self.dtype}
        if self.shards > 1:
            keys["memory"] = {"kind": "zero3", "shards": self.shards, "offload": self.offload}
        sizes = {"per_direction_batch_size": 8, "per_device_eval_batch_size": 8}
        return RunConfig.model_validate({**keys, **sizes, "signs": self.signs})

    def __str__(self) -> str:
        offload = f", offload {self.offload}" if self.offload != "none" else ""
        memory = f"zero3 of {self.shards}{offload}" if self.shards > 1 else "resident"
        signs = ", sequential signs" if self.signs == "sequential" else ""
        return f"{self.model}, {self.dtype}, {memory}{signs}"


CASES = (
    Case("opt-125m"),
    Case("opt-125m", shards=2),
    Case("opt-125m", shards=2, offload="cpu"),
    Case("gpt2"),
    Case("gpt2", signs="sequential"),
    Case("llama", "bfloat16"),
    Case("llama", "bfloat16", shards=2),
    Case("bert", "bfloat16"),
)


def make_models(folder: Path) -> None:
    """One of each architecture, at random; all but OPT with fewer layers than published ones."""
    import torch
    import transformers as hf

    opt_125m().save_pretrained(folder / "opt-125m")
    torch.manual_seed(0)
    llama = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16}
    hf.LlamaForCausalLM(hf.LlamaConfig(**llama, num_key_value_heads=8)).save_pretrained(folder / "llama")
    hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=4)).save_pretrained(folder / "gpt2")
    bert = hf.BertForSequenceClassification(hf.BertConfig(num_hidden_layers=6))
    bert.save_pretrained(folder / "bert")


def child(case: Case, rank: int, folder: Path) -> None:
    """Do a replica's work and print the most bytes of tensors there were, MiB."""
    import torch
    from torch import distributed

    from zoray.commits import seal
    from zoray.memory import Resident
    from zoray.memory.zero3 import Sharding, Zero3, partitioned_loading
    from zoray.models import load_model
    from zoray.replica import Replica

    torch.set_num_threads(1)
    config, memory, loading = case.config(folder), Resident, nullcontext()
    if case.shards > 1:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/world", rank=rank, world_size=case.shards)
        sharding = Sharding(case.offload)  # type: ignore[arg-type]
        memory = partial(Zero3, sharding=sharding)  # type: ignore[assignment]
        loading = partitioned_loading(getattr(torch, case.dtype), sharding)  # type: ignore[assignment]
    peaks = {}
    with Peak() as peak:
        with loading:
            model = load_model(config, num_labels=2 if case.model == "bert" else None)
        replica = Replica(model, memory=memory, signs=config.signs)
    peaks["loading"], lasting = peak.peak, peak.now
    ids = torch.randint(3, 30000, (8, 64), generator=torch.Generator().manual_seed(rank))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if case.model == "bert":
        batch["labels"] = ids[:, 0] % 2
        batch["attention_mask"][0, -8:] = 0
    commits = [
        seal(step, 2.0**-20, 0.5, 0.0, tuple((step, index, index + 1) for index in range(16)), bytes(32))
        for step in range(64)
    ]
    work = {
        "proof": lambda: replica.prove(batch),
        "probe": lambda: replica.probe(0, 0, batch, 1e-3),
        "evaluation": lambda: replica.evaluate(batch),
        "update": lambda: replica.apply(commits),
        "digest": replica.digest,
    }
    for name, do in work.items():
        with Peak() as peak:
            do()
        peaks[name] = lasting + peak.peak
    print(json.dumps({"tensors": max(peaks.values()) / 2**20, "when": max(peaks, key=lambda name: peaks[name])}))
    if case.shards > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def measure(index: int, folder: Path) -> tuple[float, str, float]:
    """(most tensors, while doing what, most memory of the kernel), MiB, of the larger of a case's fresh processes."""
    (folder / "world").unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.plan", "--folder", str(folder), "--child", str(index), "--rank"]
    ranks = range(CASES[index].shards)
    processes = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in ranks]
    most = 0.0
    while any(process.poll() is None for process in processes):
        most = max(most, *(given(process.pid) for process in processes))
        time.sleep(0.005)
    facts = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    largest = max(facts, key=lambda fact: float(fact["tensors"]))
    return largest["tensors"], largest["when"], most


def given(pid: int) -> float:
    """Anonymous and shared memory of a process, MiB; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return sum(int(size) for size in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status)) / 1024


@dataclass(frozen=True)
class Figure:
    """Predicted and measured peaks of a case, MiB: of tensors, and of what the kernel gives the process."""

    case: str
    when: str
    planned_tensors: float
    tensors: float
    planned: float
    process: float


def figure(case: Case, folder: Path, found: tuple[float, str, float]) -> Figure:
    """What is planned for a case, beside what was measured."""
    from zoray.planning import Planner

    need = Planner(case.config(folder)).plan().need
    beside = [need.host.lasting.get(name, 0) for name in ("process", "kept of gathered modules")]
    tensors, when, most = found
    return Figure(str(case), when, (need.host.peak - sum(beside)) / 2**20, tensors, need.host.peak / 2**20, most)


def summary(what: str, kind: str, figures: list[Figure]) -> Row:
    """One row for some cases: all their ratios, and the one that is furthest off."""
    pairs = {
        each.case: (each.planned_tensors, each.tensors) if what == "tensors" else (each.planned, each.process)
        for each in figures
    }
    ratios = {case: planned / real for case, (planned, real) in pairs.items()}
    worst = max(ratios, key=lambda case: abs(ratios[case] - 1))
    planned, real = pairs[worst]
    text = f"{spread(list(ratios.values()))}; furthest off: {worst}, {planned:,.0f} MiB / {real:,.0f} MiB"
    met = all(abs(ratio - 1) <= WITHIN for ratio in ratios.values())
    name = f"{what}, predicted / measured peak, {len(ratios)} {kind}"
    return Row(name, text, "within 15 %", met)


def main() -> None:
    """Measure and write the section `plan` of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first case alone")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(CASES[options.child], options.rank, options.folder)
        return
    found: list[tuple[Case, Figure]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        for index, case in enumerate(CASES[:1] if options.quick else CASES):
            found.append((case, figure(case, folder, measure(index, folder))))
            print(json.dumps(asdict(found[-1][1])), flush=True)
    write_section("plan", "Planned and taken", "python -m benchmarks.plan", rows(found))


def rows(found: list[tuple[Case, Figure]]) -> list[Row]:
    """The rows of the page."""
    groups = {
        "resident replicas": [each for case, each in found if case.shards == 1],
        "sharded replicas": [each for case, each in found if case.shards > 1],
    }
    made = []
    for kind, figures in groups.items():
        if figures:
            made += [summary(what, kind, figures) for what in ("tensors", "process memory")]
    return made


if __name__ == "__main__":
    main()
