"""Tables and plots of the runs that are there: a section of RESULTS.md, and what docs/learning.md quotes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Row, write_section
from benchmarks.learning import fidelity, tasks
from benchmarks.learning.methods import METHODS, THIRD
from benchmarks.learning.plots import plot_all
from benchmarks.learning.runs import EVALUATION, EXTENSIONS, RATES, Results
from benchmarks.learning.statistics import Estimate, effective_dimension, expected_cosine
from benchmarks.learning.store import lines, read
from benchmarks.learning.summary import ACCURACY, LOSS, Cell, cell, difference, share_to_reach

PAGE = Path(__file__).parents[2] / "docs/learning.md"
BASELINE = "mezo"
THIRDS = (
    "default-third",
    "groups-third",
    "signs-third",
    "signs-groups-third",
    "adapters-third",
    "adapters-groups-third",
    "fzoo-third",
)
"""Methods that take a third of the passes, the first being what `zoray train` does unless it is told otherwise."""
WHOLE = ("default", "groups", "signs")
"""The same with all of them: none may diverge."""
Cells = dict[tuple[str, str], Cell]

NOT_WORSE, WORSE = "≤ 0 within the interval", "> 0 beyond the interval"
PAIRS = (
    ("rank1", "dense", "rank-1 against dense Rademacher", ""),
    ("rank4", "rank1", "rank-4 against rank-1", ""),
    ("rank1", "rank1-float", "int8 against float32 scalars", NOT_WORSE),
    ("rank1-sign", "rank1-float", "sign only against float32 scalars", ""),
    ("rank1-bf16", "rank1", "bfloat16 rounded stochastically against float32, K = 16", NOT_WORSE),
    (
        "rank1-bf16-wide",
        "rank1",
        "bfloat16 rounded stochastically, epsilon = 0.003, against float32, K = 16",
        NOT_WORSE,
    ),
    ("mezo-bf16", "mezo", "bfloat16 in place, as MeZO does it, against float32", WORSE),
    ("rank1-rows", "rank1", "4 rows a probe against 16", ""),
    ("default", "signs", "directions of inputs against signs", ""),
    ("default-third", "signs-third", "directions of inputs against signs, a third of the passes", ""),
    (
        "groups-third",
        "signs-groups-third",
        "directions of inputs against signs, both one-sided, four on a batch, a third of the passes",
        "",
    ),
    (
        "groups-third",
        "default-third",
        "one-sided, four on a batch, against two-sided, both of inputs, a third of the passes",
        "",
    ),
    ("groups", "default", "one-sided, four on a batch, against two-sided, both of inputs", ""),
    (
        "signs-groups-third",
        "signs-third",
        "one-sided, four on a batch, against two-sided, both of signs, a third of the passes",
        "",
    ),
    ("adapters-third", "signs-third", "adapters of inputs against what the task trains, both of signs", ""),
    ("moment", "rank1", "second moment against plain SGD", ""),
    ("momentum", "rank1", "momentum against plain SGD", ""),
    ("nesterov", "momentum", "Nesterov against momentum", ""),
    ("zscore", "rank1", "z-scores against plain SGD", ""),
    ("ranks", "rank1", "ranks against plain SGD", ""),
    ("guided", "rank1", "good and bad candidates against plain SGD", ""),
)
"""Methods that differ in one thing, and the target for the held-out loss of the first minus that of the second."""


def report() -> None:
    """Write all of it."""
    results = read()
    cells = {(task, method): cell(results, task, method) for task in tasks.VERSIONS for method in METHODS}
    # First, while the tree is still as it was committed: the section says of which commit it is.
    write_section(
        "learning", "Learning per forward pass", "python -m benchmarks.learning", list(figures(results, cells))
    )
    measured = sorted(lines(fidelity.RESULTS), key=_place)
    plot_all(cells, measured)
    text = "\n".join([*curves(cells), *pairs(cells), *rates(cells), *fidelities(measured)])
    page = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(r"(<!-- learning -->\n).*?(\n<!-- /learning -->)", re.DOTALL)
    PAGE.write_text(pattern.sub(lambda match: match[1] + text + match[2], page), encoding="utf-8")


def figures(results: Results, cells: Cells) -> Iterator[Row]:
    """The rows of RESULTS.md."""
    yield Row("runs of tasks, methods, learning rates and seeds", str(len(results)), "reported", None)
    for task in tasks.VERSIONS:
        for method in THIRDS:
            gap = difference(cells[task, method], cells[task, BASELINE])
            if gap is not None and gap.count > 1:
                what = f"{task}: held-out loss minus that of MeZO after all passes, {METHODS[method].title}"
                yield Row(what, f"{signed(gap)}, {gap.count} pairs", "≤ 0", gap.mean <= 0)
        for method in WHOLE:
            one = cells[task, method]
            if one.outcomes:
                start = next(iter(one.outcomes.values())).curve[0][LOSS]
                value = f"{one.diverged} of {len(one.outcomes)} diverged; {one.final()} from {start:.4f}"
                yield Row(f"{task}: {METHODS[method].title}", value, "none diverges", one.diverged == 0)
                share, never = share_to_reach(one, cells[task, BASELINE])
                soon = share is not None and never == 0 and share.mean + share.half <= THIRD
                what = f"{task}: passes to MeZO's final loss / MeZO's, {METHODS[method].title}"
                yield Row(what, reached(share, never), "≤ 1/3", soon)
    for first, second, what, target in PAIRS:
        for task in tasks.VERSIONS:
            gap = difference(cells[task, first], cells[task, second])
            if gap is not None and gap.count > 1:
                worse = gap.mean - gap.half > 0
                met = None if not target else worse == (target == WORSE)
                value = f"{signed(gap)}, {gap.count} pairs"
                yield Row(f"{task}: held-out loss, {what}", value, target or "reported", met)


def curves(cells: Cells) -> Iterator[str]:
    """A table per task: how each method ends, and how soon it gets to where MeZO ends."""
    for task in tasks.VERSIONS:
        if not any(cells[task, method].outcomes for method in METHODS):
            continue
        what = tasks.get(task)
        yield f"### {task}: {what.title}\n"
        yield f"![held-out loss against forward passes](learning/{task}.svg)\n"
        yield f"{what.budget:,} forward passes of {tasks.ROWS} rows. Held-out loss and accuracy at the end.\n"
        yield "| method | learning rate | seeds | loss | accuracy | loss minus MeZO's | passes to MeZO's loss |"
        yield "|---|---|---|---|---|---|---|"
        theirs = cells[task, BASELINE]
        for method, how in METHODS.items():
            one = cells[task, method]
            if one.outcomes:
                yield f"| {how.title} | {one.rate:.3g} | {seeds(one)} | {against(one, theirs)} |"
        yield ""


def against(one: Cell, theirs: Cell) -> str:
    """The last four columns."""
    if not one.lasting:
        return "| | | "
    found = [str(one.final()), f"{100 * one.final(ACCURACY).mean:.1f} ± {100 * one.final(ACCURACY).half:.1f} %"]
    if one is theirs or not theirs.lasting:
        return " | ".join([*found, "", ""])
    gap = difference(one, theirs)
    return " | ".join([*found, "" if gap is None else signed(gap), reached(*share_to_reach(one, theirs))])


def pairs(cells: Cells) -> Iterator[str]:
    """Methods that differ in one thing, seed by seed."""
    yield "### One thing at a time\n"
    yield "Held-out loss at the end, the first minus the second, each at its own best rate, and the pairs of seeds."
    yield "Negative: the first is better.\n"
    yield "| | " + " | ".join(tasks.VERSIONS) + " |"
    yield "|---|" + "---|" * len(tasks.VERSIONS)
    for first, second, what, _ in PAIRS:
        gaps = [difference(cells[task, first], cells[task, second]) for task in tasks.VERSIONS]
        if any(gaps):
            yield (
                f"| {what} | "
                + " | ".join("" if gap is None else f"{signed(gap)} ({gap.count})" for gap in gaps)
                + " |"
            )
    yield ""


def rates(cells: Cells) -> Iterator[str]:
    """Every grid: the learning rates and what they came to."""
    yield "### Learning rates\n"
    yield f"{RATES} rates, each √10 times the one before; where the best was at an edge, up to {EXTENSIONS} more;"
    yield "then the two halfway to the best's neighbours."
    yield "Mean held-out loss at the end over the tuning seeds; ∞: diverged.\n"
    yield "![final loss against learning rate](learning/rates.svg)\n"
    yield "| task | method | rate: loss |"
    yield "|---|---|---|"
    for (task, method), one in cells.items():
        if one.tuning:
            tried = ", ".join(
                f"{rate:.3g}: {bold(loss, rate == one.rate)}" for rate, loss in sorted(one.tuning.items())
            )
            yield f"| {task} | {METHODS[method].title} | {tried} |"
    yield ""


def fidelities(measured: list[dict[str, Any]]) -> Iterator[str]:
    """Cosine of the estimate to the gradient against K, and the weights that theory would need for it."""
    yield "### The estimate, and how many directions to take\n"
    yield "![cosine against directions](learning/fidelity.svg)\n"
    head = [f"K = {count}" for count in fidelity.COUNTS]
    yield "| task | case | directions | " + " | ".join(head) + " | spread at 16 | effective weights |"
    yield "|---|---|---|" + "---|" * (len(head) + 2)
    for number, line in enumerate(measured):
        where = f"| {line['task']} | {line['case']} |"
        weights = line["weights"]
        if number == 0 or any(line[name] != measured[number - 1][name] for name in ("task", "case")):
            theory = " | ".join(f"{expected_cosine(weights, count):.4f}" for count in fidelity.COUNTS)
            yield f"{where} √(K / (d + K − 1)) | {theory} | | {weights:,} |"
        shown = " | ".join(f"{line['cosines'][str(count)]:.4f}" for count in fidelity.COUNTS)
        spread = float(np.std(line["single"], ddof=1) / np.mean(line["single"]))
        effective = effective_dimension(line["cosines"]["16"], 16)
        yield f"{where} {line['kind']} | {shown} | {100 * spread:.0f} % | {effective:,.0f} |"
    yield ""


def _place(line: dict[str, Any]) -> tuple[int, ...]:
    """Where a line of the fidelities belongs in their table, whenever it was measured."""
    orders = (list(tasks.VERSIONS), list(fidelity.CASES), list(fidelity.KINDS))
    return tuple(order.index(line[name]) for order, name in zip(orders, ("task", "case", "kind"), strict=True))


def reached(share: Estimate | None, never: int) -> str:
    """The share of MeZO's forward passes, and how many seeds do not get there."""
    shown = "" if share is None else f"{share.mean:.2f}" + (f" ± {share.half:.2f}" if math.isfinite(share.half) else "")
    return ", ".join(filter(None, [shown, f"{never} never" if never else ""]))


def signed(gap: Estimate) -> str:
    """A difference with its sign and interval."""
    return f"{gap.mean:+.4f}" + (f" ± {gap.half:.4f}" if math.isfinite(gap.half) else "")


def seeds(one: Cell) -> str:
    """How many seeds there are, and how many of them diverged."""
    missing = f" of {len(EVALUATION)}" if len(one.outcomes) < len(EVALUATION) else ""
    return f"{len(one.outcomes)}{missing}" + (f", {one.diverged} diverged" if one.diverged else "")


def bold(loss: float, best: bool) -> str:
    """A loss as the table shows it."""
    shown = f"{loss:.4f}" if math.isfinite(loss) else "∞"
    return f"**{shown}**" if best else shown
