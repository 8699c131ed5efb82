"""Large models on one accelerator, resident and streamed: python -m benchmarks.gpu OUT [--budget SECONDS].

OPT's published shapes at random, in bfloat16, 512 tokens a row. Each part runs in a process of its own and writes
OUT/PART.json as soon as it has something; one that fails, or for which no time is left, does not stop the next. Neither
Ray nor DeepSpeed is needed, so it runs where a GPU is lent. `--report OUT` makes the section `gpu` of RESULTS.md of
such a folder afterwards, anywhere. `--device cpu --quick` tries the script out, on tiny shapes.

A machine of 128 GiB cannot hold OPT-66B's weights. What its layers take of the device is seen with as many of them as
fit, since no more than two are there at a time.

The directions are of inputs, as `zoray train` has them. A probe has both signs, so it is compared with two plain
forwards of its rows; a step of K directions with 2K. What is streamed is compared with copying as many bytes, in one
piece, from memory that is not paged out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from benchmarks.common import Row, seconds, write_section
from zoray.aggregate import ProbeResult, commit
from zoray.commits import Commit
from zoray.inputs import find_mixtures, random_texts
from zoray.memory.streamed import Streamed, Streaming
from zoray.replica import Replica
from zoray.update import apply_commits

TOKENS = 512
WIDE = 16
"""Directions of the wide step."""

GIB = 1 << 30


@dataclass(frozen=True)
class Shape:
    """A published OPT: `layers` of them as published."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int = 50272

    @property
    def layer_bytes(self) -> int:
        """Of a layer in bfloat16: four matrices of attention, two four times as large, and some vectors."""
        return 2 * (12 * self.hidden**2 + 13 * self.hidden)


SHAPES = {
    "opt-13b": Shape(5120, 40, 40),
    "opt-30b": Shape(7168, 48, 56),
    "opt-66b": Shape(9216, 64, 72),
}
TINY = Shape(64, 3, 2, 300)


@dataclass(frozen=True)
class Part:
    """What is measured in one process.

    Attributes:
        memory: "resident", or "cpu" or "nvme" for where the streamed weights lie.
        batch: rows of a probe, for each sign.
        least: seconds below which it is not begun.
        most: seconds after which it is ended.
    """

    shape: str
    memory: str
    batch: int
    least: int
    most: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.shape}-{self.memory}"


PARTS = (
    Part("opt-13b", "resident", 8, 60, 130),
    Part("opt-13b", "cpu", 4, 60, 120),
    Part("opt-66b", "cpu", 4, 90, 200),
    Part("opt-30b", "resident", 4, 60, 100),
    Part("opt-13b", "nvme", 4, 60, 130),
)
"""In the order of what we want to know most."""


class Notes:
    """What a part has found out, on the disk after every fact."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.facts: dict[str, Any] = {}

    def note(self, **facts: Any) -> None:
        """Add facts."""
        self.facts |= facts
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps(self.facts, indent=1))
        beside.replace(self._path)
        print(facts, flush=True)


class Bench:
    """One part: the model, its replica, and a clock that waits for the device."""

    def __init__(self, part: Part, device: str, quick: bool, notes: Notes, folder: Path) -> None:
        self.part, self.device, self.notes = part, torch.device(device), notes
        self.rounds = 1 if quick else 5
        published = TINY if quick else SHAPES[part.shape]
        # The rest is for the process itself, and what else runs on the machine.
        room = int(0.72 * psutil.virtual_memory().available) - 4 * GIB
        fit = room // published.layer_bytes if part.memory == "cpu" else published.layers
        self.shape, self.layers = published, min(published.layers, fit)
        self.addresses = count()
        self.model = self._model()
        weights = sum(p.numel() for p in self.model.parameters())
        facts = {"layers": self.layers, "published_layers": published.layers, "device": machine(self.device)}
        notes.note(weights=weights, **facts)
        with self.timed("placing"):
            self.replica = self._replica(folder)
        ids = torch.randint(3, published.vocabulary, (part.batch, TOKENS if not quick else 16))
        self.batch = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
        self.batch["labels"] = self.batch["input_ids"]
        notes.note(tokens=ids.numel())

    def _model(self) -> nn.Module:
        """The model: resident ones at random, the others with weights that take no memory yet."""
        from transformers import OPTConfig, OPTForCausalLM

        shape = self.shape
        config = OPTConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            word_embed_proj_dim=shape.hidden,
            ffn_dim=4 * shape.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=2048,
        )
        torch.manual_seed(0)
        with torch.device("meta"):
            model: Any = OPTForCausalLM(config).to(torch.bfloat16)
        resident = self.part.memory == "resident"
        place = self.device if resident else torch.device("cpu")
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                of_norm = isinstance(module, nn.LayerNorm) and name == "weight"
                values = torch.ones_like(parameter, device=place) if of_norm else _fresh(parameter, place, resident)
                module._parameters[name] = nn.Parameter(values)
        model.tie_weights()
        assert not list(model.buffers()), "a buffer would be without values"
        return model.eval()

    def _replica(self, folder: Path) -> Replica:
        if self.part.memory == "resident":
            return Replica(self.model, direction="inputs")
        files = folder if self.part.memory == "nvme" else None
        streaming = Streaming("cpu" if files is None else "nvme", files, self.device)
        replica = Replica(self.model, direction="inputs", memory=partial(Streamed, streaming=streaming))
        for shard in replica.memory.shards(writing=True):
            if shard.spec.rank:
                # The device draws faster than the processor.
                values = torch.randn(shard.values.shape, device=self.device, dtype=torch.bfloat16)
                shard.values.copy_(values.mul_(0.02))
        return replica

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note how long the block takes, and what the device has at most in it."""
        with self.peak(name):
            started = time.perf_counter()
            yield
            self.wait()
            took = time.perf_counter() - started
        self.notes.note(**{name: took})

    @contextmanager
    def peak(self, name: str) -> Iterator[None]:
        """Note what the device has at most in the block; a processor's memory is not counted."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats()
        yield
        sizes = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        self.notes.note(**{f"{name}_{kind}": size for kind, size in sizes.items()})

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def times(self, work: Callable[[], object], rounds: int) -> list[float]:
        """Seconds of each of so many calls; what is pending before is not counted."""
        found = []
        for _ in range(rounds):
            self.wait()

            def whole() -> None:
                work()
                self.wait()

            found.append(seconds(whole))
        return found

    def plain(self) -> None:
        """The two plain forwards of a probe."""
        with torch.no_grad():
            for _ in range(2):
                self.model(**self.batch, use_cache=False)

    def probe(self) -> None:
        """One probe."""
        self.replica.probe(next(self.addresses), 0, self.batch, 1e-3)

    def commit(self, directions: int) -> Commit:
        """The next one, of so many directions; which coefficients they have does not matter to the time."""
        step = self.replica.step
        return commit(step, [ProbeResult(step, k, 0, 1.0 + k, 1.0) for k in range(directions)], learning_rate=1e-9)

    def step(self, directions: int) -> None:
        """An update, and one probe of the step after it: with one direction, a step."""
        self.replica.apply(self.commit(directions))
        self.probe()

    def run(self) -> None:
        """All of it."""
        with self.timed("inputs"), self.replica.memory.forwards(first=True):
            find_mixtures(self.model, random_texts(self.model, 0), 0)
        self.replica.memory.settle()
        with self.timed("first"):
            self.replica.prove({name: values[:2] for name, values in self.batch.items()})
        self.probe()
        if self.part.memory == "resident":
            self.resident()
        else:
            self.streamed()

    def resident(self) -> None:
        """Step, its parts and the plain forwards, in turn."""
        self.plain()
        names: dict[str, Callable[[], object]] = {
            "plain": self.plain,
            "probe": self.probe,
            "update_1": lambda: self.replica.apply(self.commit(1)),
            f"update_{WIDE}": lambda: self.replica.apply(self.commit(WIDE)),
        }
        found: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(self.rounds):
            for name, work in names.items():
                with self.peak(name):
                    found[name] += self.times(work, 1)
            self.notes.note(times=found)
        shards = [s for s in self.replica.memory.shards() if ".layers.0." in s.spec.name]
        weights = sum(s.values.numel() for s in shards)
        sizes = {}
        for power in (19, 21, 23, 25):
            work = partial(apply_commits, self.replica.directions, shards, [self.commit(1)], 1 << power)
            sizes[str(power)] = min(self.times(work, 2)) / weights
            self.notes.note(update_by_block=sizes)

    def streamed(self) -> None:
        """Step and probe against the bus."""
        if self.device.type == "cuda":
            self.notes.note(bandwidth=self.bandwidth())
        rounds = self.rounds if self.part.memory == "cpu" else min(2, self.rounds)
        found: dict[str, list[float]] = {"probe": [], "step": []}
        for _ in range(rounds):
            for name, work in (("probe", self.probe), ("step", lambda: self.step(1))):
                with self.peak(name):
                    found[name] += self.times(work, 1)
                self.notes.note(times=found)
        with self.timed("digest"):
            self.replica.digest()

    def bandwidth(self) -> dict[str, float]:
        """Bytes a second to the device and back, and both in turn, of one large piece."""
        here, there = torch.empty(GIB, dtype=torch.uint8, pin_memory=True), torch.empty(GIB, dtype=torch.uint8).cuda()
        copies = {
            "in": lambda: there.copy_(here, non_blocking=True),
            "out": lambda: here.copy_(there, non_blocking=True),
        }
        return {name: GIB / statistics.median(self.times(work, 5)) for name, work in copies.items()}


def _fresh(parameter: nn.Parameter, place: torch.device, at_random: bool) -> torch.Tensor:
    """Values for a parameter: biases of zero; a matrix at random, or one row over and over, which takes no memory.

    Each has memory of its own, so that no two are taken for one.
    """
    if parameter.dim() == 1:
        return torch.zeros_like(parameter, device=place)
    if at_random:
        return torch.empty_like(parameter, device=place).normal_(0, 0.02)
    return torch.zeros(parameter.shape[1:], dtype=parameter.dtype).expand(parameter.shape)


def machine(device: torch.device) -> str:
    """The device, the processor's cores and memory, and versions."""
    import transformers

    memory = f"{psutil.virtual_memory().total / GIB:.0f} GiB of memory, {os.cpu_count()} cores"
    name = platform.machine()
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        name = f"{facts.name}, {facts.total_memory / GIB:.0f} GiB"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{name}; {memory}; {versions}"


def child(part: Part, out: Path, files: Path, device: str, quick: bool) -> None:
    """Run one part, and write down what goes wrong too."""
    # The device draws the weights, the processors move them.
    torch.set_num_threads(os.cpu_count() or 1)
    notes = Notes(out / f"{part.name}.json")
    notes.note(part=part.name, batch=part.batch, started=time.strftime("%Y-%m-%d %H:%M:%S"))
    try:
        with tempfile.TemporaryDirectory(dir=files) as folder:
            Bench(part, device, quick, notes, Path(folder)).run()
        notes.note(done=True)
    except Exception:
        notes.note(fault=traceback.format_exc())
        raise


def figures(out: Path) -> tuple[list[Row], str]:
    """The rows of the page of what is in a folder, and the machine it was made on."""
    rows, where = [], ""
    for part in PARTS:
        path = out / f"{part.name}.json"
        facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if "times" not in facts:
            reason = facts.get("fault", "ended before anything was timed") if facts else "not run"
            rows.append(Row(f"{part.shape}, {part.memory}", reason.strip().splitlines()[-1], "reported", None))
            continue
        where = str(facts["device"])
        rows += _resident_rows(part, facts) if part.memory == "resident" else _streamed_rows(part, facts)
    return rows, where


def _title(part: Part, facts: dict[str, Any]) -> str:
    layers = f", {facts['layers']} of its {facts['published_layers']} layers"
    kind = "resident" if part.memory == "resident" else f"streamed, {part.memory}"
    whole = facts["layers"] == facts["published_layers"]
    return f"{part.shape}{'' if whole else layers}, {facts['weights'] / 1e9:,.1f}B weights, {kind}"


def _medians(facts: dict[str, Any]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in facts["times"].items() if values}


def _resident_rows(part: Part, facts: dict[str, Any]) -> list[Row]:
    title, at = _title(part, facts), _medians(facts)
    rate = facts["tokens"] / at["probe"]
    rows = [
        Row(
            f"{title}: probe / two plain forwards",
            f"{at['probe'] / at['plain']:.3f}; {at['probe'] * 1e3:,.0f} ms / {at['plain'] * 1e3:,.0f} ms; "
            f"{rate:,.0f} tokens/s",
            "≤ 1.05",
            at["probe"] <= 1.05 * at["plain"],
        )
    ]
    for directions in (1, WIDE):
        step, plain = directions * at["probe"] + at[f"update_{directions}"], directions * at["plain"]
        text = f"{step / plain:.3f}; of which the update {at[f'update_{directions}'] * 1e3:,.0f} ms"
        figure = f"{title}: step of {directions} directions / its plain forwards"
        rows.append(Row(figure, text, "≤ 1.05", step <= 1.05 * plain))
    if "probe_allocated" in facts:
        sizes = [facts[f"{name}_allocated"] / GIB for name in ("probe", "plain", f"update_{WIDE}")]
        text = "probe {:.1f} GiB, plain forward {:.1f} GiB, update {:.1f} GiB".format(*sizes)
        rows.append(Row(f"{title}: peak device memory", text, "reported", None))
    rows += _inputs_rows(title, facts)
    if "update_by_block" in facts:
        text = ", ".join(f"2^{power}: {took * 1e12:,.0f} ps" for power, took in facts["update_by_block"].items())
        rows.append(Row(f"{title}: update of one direction, a weight, by weights a block", text, "reported", None))
    return rows


def _streamed_rows(part: Part, facts: dict[str, Any]) -> list[Row]:
    title, at = _title(part, facts), _medians(facts)
    if "bandwidth" not in facts:
        times = ", ".join(f"{name} {took * 1e3:,.0f} ms" for name, took in at.items())
        return [Row(f"{title}: probe, step of 1 direction", times, "reported", None)]
    size = 2 * facts["weights"]
    once = size / facts["bandwidth"]["in"]
    both = once + size / facts["bandwidth"]["out"]
    rate = facts["tokens"] / at["probe"]
    target = "≤ 1.1" if part.memory == "cpu" else "reported"
    rows = [
        Row(
            f"{title}: probe / streaming all weights in once",
            f"{at['probe'] / once:.3f}; {at['probe'] * 1e3:,.0f} ms / {once * 1e3:,.0f} ms; {rate:,.0f} tokens/s",
            target,
            at["probe"] <= 1.1 * once if part.memory == "cpu" else None,
        )
    ]
    if "step" in at:
        figure = f"{title}: step of 1 direction / streaming all weights in and back"
        text = f"{at['step'] / both:.3f}; {at['step'] * 1e3:,.0f} ms / {both * 1e3:,.0f} ms; "
        text += f"{at['step'] / once:.3f} of streaming them in"
        rows.append(Row(figure, text, target, at["step"] <= 1.1 * both if part.memory == "cpu" else None))
    rows += _inputs_rows(title, facts)
    names = [f"{name}_{kind}" for name in ("inputs", "first", "probe", "step") for kind in ("allocated", "reserved")]
    most = max(facts[name] for name in names if name in facts)
    large = part.shape == "opt-66b"
    met = most <= 18 * GIB if large else None
    rows.append(Row(f"{title}: peak device memory", f"{most / GIB:.1f} GiB", "≤ 18 GiB" if large else "reported", met))
    return rows


def _inputs_rows(title: str, facts: dict[str, Any]) -> list[Row]:
    if "inputs" not in facts:
        return []
    text = f"{facts['inputs']:.1f} s, {facts['inputs_allocated'] / GIB:.1f} GiB" if "inputs_allocated" in facts else "-"
    return [Row(f"{title}: finding the inputs of layers, once in a run", text, "reported", None)]


def main() -> None:
    """Run the parts that there is time for, or report what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="folder for what is found")
    parser.add_argument("--files", type=Path, help="folder for files of weights, 26 GB; by default OUT")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round")
    parser.add_argument("--budget", type=float, default=500, help="seconds for all parts together")
    parser.add_argument("--parts", nargs="*", help="names of those to run, such as opt-13b-cpu")
    parser.add_argument("--report", type=Path, help="write the section of RESULTS.md from this folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report is not None:
        rows, where = figures(options.report)
        write_section("gpu", "Large models on one accelerator", "python -m benchmarks.gpu", rows, where)
        return
    if options.out is None:
        parser.error("a folder is needed")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child is not None:
        chosen = next(part for part in PARTS if part.name == options.child)
        child(chosen, options.out, options.files or options.out, options.device, options.quick)
        return
    ends = time.monotonic() + options.budget
    for part in PARTS:
        left = ends - time.monotonic()
        if options.parts and part.name not in options.parts:
            continue
        if left < part.least:
            print(f"{part.name}: {left:.0f} s are left, it wants {part.least}", flush=True)
            continue
        command = [sys.executable, "-m", "benchmarks.gpu", str(options.out), "--device", options.device]
        command += ["--child", part.name, "--files", str(options.files or options.out)]
        command += ["--quick"] if options.quick else []
        started = time.monotonic()
        try:
            code = subprocess.run(command, timeout=min(left, part.most)).returncode
        except subprocess.TimeoutExpired:
            code = -1
        print(f"{part.name}: ended with {code} after {time.monotonic() - started:.0f} s", flush=True)
    for row in figures(options.out)[0]:
        print(f"{row.figure} | {row.value} | {row.target} | {row.met}")


if __name__ == "__main__":
    main()
