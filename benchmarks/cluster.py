"""What crosses between coordinator and replicas, what the coordinator costs, and what a second replica brings.

    python -m benchmarks.cluster [--quick]

A real local Ray and real replicas; the coordinator runs in this process. The small model makes probes of a few
milliseconds, so that what is left of a step is the coordinator, Ray and the disk; the OPT-125M-shaped one shows whether
two one-thread replicas do twice the work of one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from actors.coordinator import Coordinator
from benchmarks.common import Row, opt_125m, write_section
from zoray.config import RunConfig
from zoray.runs import RunFolder

DIRECTIONS, FORWARDS = 16, 3


def make_inputs(folder: Path, large: bool) -> dict[str, object]:
    """A model with its tokenizer and a data set below `folder`; returns the part of a configuration that names them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    model_folder, data = folder / ("large" if large else "small"), folder / "text.jsonl"
    words = {"<end>": 0, **{f"w{i}": i + 1 for i in range(400)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(model_folder)
    shape = GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=64, vocab_size=512, bos_token_id=0, eos_token_id=0)
    (opt_125m() if large else GPT2LMHeadModel(shape)).save_pretrained(model_folder)
    rows = ({"text": " ".join(f"w{(7 * i + j * j) % 400}" for j in range(64))} for i in range(256))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(model_folder),
        "task": {"kind": "causal_lm", "train": str(data), "max_length": 64},
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "optimizer": {"normalize": "none"},
        "output_dir": str(folder / "runs"),
    }


def run(inputs: dict[str, object], **keys: object) -> tuple[list[dict[str, float]], RunFolder, int]:
    """One run; returns its rows of metrics, its folder, and the bytes on the loopback interface while it ran."""
    config = RunConfig.model_validate({**inputs, **keys})
    folder = RunFolder.create(config, "bench")
    coordinator = Coordinator(config, str(folder.path))
    coordinator.prepare(False)
    before = loopback_bytes()
    coordinator.run()
    return list(folder.rows("steps")), folder, loopback_bytes() - before


def loopback_bytes() -> int:
    """Bytes sent over the loopback interface since the machine started."""
    for text in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = text.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise RuntimeError("there is no loopback interface in /proc/net/dev")


def idle_rate(seconds: float) -> float:
    """Bytes per second that Ray sends over the loopback interface while nothing is asked of it."""
    before, started = loopback_bytes(), time.perf_counter()
    time.sleep(seconds)
    return (loopback_bytes() - before) / (time.perf_counter() - started)


def exchange(folder: Path, steps: int) -> list[Row]:
    """Bytes per step and per probe, and the coordinator's own time, with two replicas of a small model."""
    inputs = make_inputs(folder, large=False)
    rate = idle_rate(3.0)
    keys = {"directions": DIRECTIONS, "per_direction_batch_size": 2, "replicas": 2, "max_steps": steps}
    rows, run_folder, loopback = run(inputs, **keys)
    probes = steps * DIRECTIONS
    ledger = (run_folder.ledger / "commits.bin").read_bytes()
    header = 16 + int.from_bytes(ledger[8:12], "little") + 32
    per_step = (len(ledger) - header) / steps
    payload = (rows[-1]["sent"] + rows[-1]["received"]) / probes
    seconds = sum(row["seconds"] for row in rows)
    envelope = (loopback - rate * seconds) / probes
    overhead = [1e3 * (row["seconds"] - row["probe_seconds"]) for row in rows[5:]]
    commit = [1e3 * row["commit_seconds"] for row in rows[5:]]
    limit = DIRECTIONS + 96
    return [
        Row("ledger per step, 16 directions", f"{per_step:.0f} B", f"≤ {limit} B", per_step <= limit),
        Row("payload of a probe's request and answer, its share of commits included", f"{payload:.1f} B", "≤ 128 B",
            payload <= 128),
        Row("the same with Ray's envelope, on the loopback interface, idle traffic taken off", f"{envelope:,.0f} B",
            "reported", None),
        Row("coordinator overhead per step of 16 probes, 2 replicas (median)", f"{statistics.median(overhead):.1f} ms",
            "≤ 10 ms", statistics.median(overhead) <= 10),
        Row("of which deciding and fsyncing the commit (median)", f"{statistics.median(commit):.1f} ms", "", None),
    ]  # fmt: skip


def throughput(folder: Path, pairs: int) -> list[Row]:
    """Probes per second of two one-thread replicas against one, the OPT-125M shape, in turn.

    In the same turns: what two processes that run plain forwards and know nothing of each other get done against one.
    """
    inputs = make_inputs(folder, large=True)
    keys = {"directions": 4, "per_direction_batch_size": 8, "max_steps": 3}
    replicas, processes = list[float](), list[float]()
    remote: Any = ray.remote(Plain)
    for _ in range(pairs):
        seconds = {}
        for count in (1, 2):
            rows, _, _ = run(inputs, replicas=count, **keys)
            # The first step warms up.
            seconds[count] = statistics.median(row["seconds"] for row in rows[1:])
        replicas.append(seconds[1] / seconds[2])
        plain = [remote.options(num_cpus=0).remote(inputs["model"]) for _ in range(2)]
        ray.get([each.forward.remote(1) for each in plain])
        alone = ray.get(plain[0].forward.remote(FORWARDS))
        together = ray.get([each.forward.remote(FORWARDS) for each in plain])
        processes.append(2 * alone / max(together))
        for each in plain:
            ray.kill(each)
    of_hardware = [ours / theirs for ours, theirs in zip(replicas, processes, strict=True)]
    return [
        Row("throughput of 2 one-thread replicas / 1", spread(replicas), "≥ 1.9", statistics.median(replicas) >= 1.9),
        Row("the same of plain forwards in 2 processes that share nothing but the machine", spread(processes),
            "reported", None),
        Row("the first against the second", spread(of_hardware), "", None),
    ]  # fmt: skip


class Plain:
    """A process that runs plain one-thread forwards of the rows of a probe."""

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.rows = torch.arange(16 * 64).view(16, 64) % 400

    def forward(self, times: int) -> float:
        """Seconds for so many forwards."""
        import torch

        began = time.perf_counter()
        with torch.inference_mode():
            for _ in range(times):
                self.model(self.rows)
        return time.perf_counter() - began


def spread(ratios: list[float]) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Run everything and write the section `cluster` of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps and pairs, for trying the script out")
    quick = parser.parse_args().quick
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        rows = exchange(Path(folder), 30 if quick else 200)
        rows += throughput(Path(folder), 1 if quick else 5)
    ray.shutdown()
    write_section("cluster", "Between coordinator and replicas", "python -m benchmarks.cluster", rows)


if __name__ == "__main__":
    main()
