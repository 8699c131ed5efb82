"""Makes the runs that are missing, in processes of their own."""

from __future__ import annotations

import os
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from fnmatch import fnmatch
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch
from filelock import FileLock
from transformers.utils import logging

from benchmarks.common import commit
from benchmarks.learning.methods import METHODS
from benchmarks.learning.runs import Outcome, Run, train, wanted
from benchmarks.learning.store import RESULTS, append, read
from benchmarks.learning.tasks import VERSIONS


def make_missing(only: list[str], workers: int, seconds: float, results: Path | None) -> None:
    """Make runs until none is missing or the time is up.

    Raises:
        RuntimeError: at the end, if there were runs that failed; the others were made all the same.
    """
    path, started, code = results or RESULTS, time.perf_counter(), commit()
    with FileLock(f"{path}.lock", blocking=False), pool(workers) as processes:
        flying: dict[Future[tuple[Outcome, float]], Run] = {}
        failed: list[Run] = []
        while True:
            if time.perf_counter() - started < seconds:
                for run in islice(wanted(read(path), cells(only), [*flying.values(), *failed]), workers - len(flying)):
                    flying[processes.submit(train, run)] = run
            if not flying:
                break
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                run = flying.pop(future)
                if fault := future.exception():
                    failed.append(run)
                    traceback.print_exception(fault)
                    continue
                outcome, took = future.result()
                append(run, outcome, took, code, path)
                print(
                    f"{run.task}/{run.method} rate {run.rate} seed {run.seed}: {outcome.final:.4f}, {took:.0f} s",
                    flush=True,
                )
    if failed:
        raise RuntimeError(f"failed, each for the reason above: {failed}")


def cells(only: list[str]) -> list[tuple[str, str]]:
    """The (task, method) that match a pattern: those of the first pattern first, method by method."""
    named = [(task, method) for method in METHODS for task in VERSIONS]
    return list(dict.fromkeys(cell for pattern in only for cell in named if fnmatch("/".join(cell), pattern)))


def pool(workers: int) -> ProcessPoolExecutor:
    """Processes of one thread each, out of everybody's way."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=settle)


def settle() -> None:
    """One thread, no chatter, and the lowest priority."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with suppress(OSError):
        os.nice(19 - os.nice(0))
