"""The model, the clock and the page that all benchmarks share."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"
README = Path(__file__).parents[1] / "README.md"
SEQUENCE, BATCH = 64, 8


@dataclass(frozen=True)
class Row:
    """One figure: what was measured, its value with spread, its target, and whether it is met (None: no target)."""

    figure: str
    value: str
    target: str
    met: bool | None


@dataclass(frozen=True)
class Ratio:
    """Times of A and B measured in turn, in seconds."""

    a: list[float]
    b: list[float]

    @property
    def each(self) -> list[float]:
        """A/B pair by pair."""
        return [x / y for x, y in zip(self.a, self.b, strict=True)]

    @property
    def median(self) -> float:
        """Median of the pairs' ratios."""
        return statistics.median(self.each)

    def __str__(self) -> str:
        times = f"{statistics.median(self.a) * 1e3:,.0f} ms / {statistics.median(self.b) * 1e3:,.0f} ms"
        return f"{self.median:.3g} ({min(self.each):.3g} to {max(self.each):.3g}); {times}"


def in_turn(a: Callable[[], Any], b: Callable[[], Any], pairs: int) -> Ratio:
    """Time A and B alternately, after one warm-up each."""
    a(), b()
    ratio = Ratio([], [])
    for _ in range(pairs):
        ratio.a.append(seconds(a))
        ratio.b.append(seconds(b))
    return ratio


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def opt_125m() -> Any:
    """A randomly initialised OPT of 125M parameters, float32."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=50272,
        hidden_size=768,
        num_hidden_layers=12,
        ffn_dim=3072,
        num_attention_heads=12,
        max_position_embeddings=2048,
        word_embed_proj_dim=768,
    )
    return OPTForCausalLM(config).eval()


def opt_batch() -> dict[str, torch.Tensor]:
    """8 sequences of 64 random tokens with labels."""
    ids = torch.randint(3, 50000, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def machine() -> str:
    """Processor, cores and versions."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy", "ray"))
    processor = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
    return f"{processor}; Python {platform.python_version()}, {packages}"


def commit() -> str:
    """The commit that was measured."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip() or "unknown"


def write_section(key: str, title: str, command: str, rows: list[Row], origin: str | None = None) -> None:
    """Replace one section of RESULTS.md, and print it.

    Args:
        key: name of the section's markers in the page.
        command: what ran, without its options: those this process was given are added.
        origin: the machine, if it was another one than this.
    """
    command = " ".join([command, *sys.argv[1:]])
    lines = [f"## {title}", "", f"`{command}`, {date.today()}, commit {commit()}", "", origin or machine(), ""]
    lines += ["| figure | measured | target | |", "|---|---|---|---|"]
    verdict = {True: "met", False: "**missed**", None: ""}
    lines += [f"| {row.figure} | {row.value} | {row.target} | {verdict[row.met]} |" for row in rows]
    section = f"<!-- {key} -->\n" + "\n".join(lines) + f"\n<!-- /{key} -->\n"
    print(section)
    page = RESULTS.read_text() if RESULTS.exists() else HEADER
    pattern = re.compile(rf"<!-- {key} -->.*?<!-- /{key} -->\n", re.DOTALL)
    page = pattern.sub(lambda _: section, page) if pattern.search(page) else page + "\n" + section
    RESULTS.write_text(page)
    README.write_text(quoted(page, README.read_text()))


def quoted(results: str, readme: str) -> str:
    """The README with the figures of all sections of RESULTS.md in its table, each with the commit it is of."""
    rows = ["| figure | measured | target | | commit |", "|---|---|---|---|---|"]
    for section in re.findall(r"<!-- \w+ -->\n(.*?)<!-- /\w+ -->", results, re.DOTALL):
        found = re.search(r"commit (\S+)", section)
        at = found[1] if found else ""
        figures = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| figure")]
        rows += [f"{line} {at} |" for line in figures]
    pattern = re.compile(r"(<!-- measured -->\n).*?(\n<!-- /measured -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + "\n".join(rows) + match[2], readme)


HEADER = """# Results

Ratios against a named baseline, both timed in turn in one process: the median of the pairs' ratios, the smallest and
the largest, then the median times. Each section is written by the command it names; targets that are missed say so.
"""
