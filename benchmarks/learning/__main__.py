"""Make missing runs, or report those that are there: python -m benchmarks.learning [--report].

Runs need no Ray; each takes one core for 10 to 60 seconds. Stop it at any time: what is done is kept, and the next
call goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument(
        "--only", action="append", metavar="TASK/METHOD", help="patterns such as prose/rank1*, the first first"
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

        measure_missing(options.budget_seconds)
    else:
        from benchmarks.learning.workers import make_missing

        make_missing(options.only or ["*/*"], options.workers, options.budget_seconds, options.results)


if __name__ == "__main__":
    main()
