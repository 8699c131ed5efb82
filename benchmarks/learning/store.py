"""The results file: one line of JSON per run, appended and never changed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.learning.runs import Outcome, Run

RESULTS = Path(__file__).parent / "results.jsonl"


def read(path: Path = RESULTS) -> dict[Run, Outcome]:
    """The runs of the present versions of tasks and methods; of two lines of one run, the first."""
    found: dict[Run, Outcome] = {}
    for line in lines(path):
        try:
            run = Run(line["task"], line["method"], line["rate"], line["seed"])
            current = run.versions == tuple(line["versions"])
        except KeyError:  # a task or a method that is no more
            continue
        if current and run not in found:
            curve = tuple(tuple(math.nan if x is None else x for x in point) for point in line["curve"])
            found[run] = Outcome(curve, line["diverged"])  # type: ignore[arg-type]
    return found


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines; one that was cut short by a crash is passed over, and written anew with its run."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n") and line.strip():
            yield json.loads(line)


def append(run: Run, outcome: Outcome, seconds: float, commit: str, path: Path = RESULTS) -> None:
    """Add one run; what is not finite is written as null, since JSON knows no such numbers."""
    curve = [[_rounded(x) for x in point] for point in outcome.curve]
    line = {"task": run.task, "method": run.method, "rate": run.rate, "seed": run.seed, "versions": run.versions}
    line |= {"diverged": outcome.diverged, "seconds": round(seconds, 1), "commit": commit, "curve": curve}
    add(line, path)


def add(line: dict[str, Any], path: Path) -> None:
    """Append one line, after ending one that was cut short."""
    with path.open("ab+") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                _cut(path)
        file.write((json.dumps(line) + "\n").encode())


def _cut(path: Path) -> None:
    whole = path.read_bytes().rpartition(b"\n")
    os.truncate(path, len(whole[0]) + len(whole[1]))


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
