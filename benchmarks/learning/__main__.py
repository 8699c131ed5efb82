"""Make missing runs, or report those that are there: python -m benchmarks.learning [--report].

Runs need no Ray; each takes one core for 10 to 60 seconds. Stop it at any time: what is done is kept, and the next call goes
on from there.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from fnmatch import fnmatch
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from benchmarks.learning.runs import Outcome, Run, train, wanted


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument(
        "--only", action="append", metavar="TASK/METHOD", help="patterns such as prose/rank1*; may be repeated"
    )
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no run after this long")
    parser.add_argument("--results", type=Path, help="another results file")
    parser.add_argument("--fidelity", action="store_true", help="measure the estimates instead of training")
    parser.add_argument("--report", action="store_true", help="write tables and plots of what is there")
    options = parser.parse_args()
    if options.report:
        from benchmarks.learning.report import report

        report()
    elif options.fidelity:
        from benchmarks.learning.fidelity import measure_missing

        _settle()
        measure_missing(options.budget_seconds)
    else:
        make_missing(options.only or ["*/*"], options.workers, options.budget_seconds, options.results)


def make_missing(only: list[str], workers: int, seconds: float, results: Path | None) -> None:
    """Make runs until none is missing or the time is up."""
    from filelock import FileLock

    from benchmarks.common import commit
    from benchmarks.learning.store import RESULTS, append, read

    path, started, code = results or RESULTS, time.perf_counter(), commit()
    with FileLock(f"{path}.lock", blocking=False), pool(workers) as processes:
        flying: dict[Future[tuple[Outcome, float]], Run] = {}
        while True:
            if time.perf_counter() - started < seconds:
                for run in islice(wanted(read(path), cells(only), flying.values()), workers - len(flying)):
                    flying[processes.submit(train, run)] = run
            if not flying:
                return
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                run = flying.pop(future)
                outcome, took = future.result()
                append(run, outcome, took, code, path)
                print(
                    f"{run.task}/{run.method} rate {run.rate} seed {run.seed}: {outcome.final:.4f}, {took:.0f} s",
                    flush=True,
                )


def cells(only: list[str]) -> list[tuple[str, str]]:
    """The (task, method) that match a pattern; one method goes through all tasks before the next."""
    from benchmarks.learning.methods import METHODS
    from benchmarks.learning.tasks import VERSIONS

    named = [(task, method) for method in METHODS for task in VERSIONS]
    return [cell for cell in named if any(fnmatch("/".join(cell), pattern) for pattern in only)]


def pool(workers: int) -> ProcessPoolExecutor:
    """Processes of one thread each, out of everybody's way."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_settle)


def _settle() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with suppress(OSError):
        os.nice(19 - os.nice(0))


if __name__ == "__main__":
    main()
