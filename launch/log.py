"""`zoray log`: the ledger as a table, as JSON lines, or as a Parquet file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.restore import open_run
from zoray.ledger import Ledger

_COLUMNS = ("step", "loss", "eta", "decay", "terms", "norm", "applied", "learning_rate", "gradient_rms", "seconds")


def log(run: str, as_json: bool, parquet: Path | None, last: int | None, output_dir: str) -> None:
    """Show the commits of a run, beside the metrics of their steps where there are any.

    Raises:
        ZorayError: the run cannot be found, or its ledger is damaged.
    """
    folder, _, ledger = open_run(run, output_dir)
    metrics = {int(row["step"]): row for row in folder.rows("steps")}
    start = max(0, ledger.next_step - last) if last else 0
    rows = list(_rows(ledger, start, metrics))
    if parquet is not None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), parquet)
        Console(soft_wrap=True).print(f"{len(rows)} commits: {parquet}", markup=False)
    elif as_json:
        for row in rows:
            print(json.dumps({key: None if _missing(value) else value for key, value in row.items()}))
    else:
        Console(width=None if Console().is_terminal else 160).print(_table(rows))


def _rows(ledger: Ledger, start: int, metrics: dict[int, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for commit in ledger.commits(start):
        measured = metrics.get(commit.step, {})
        coefficients = [coefficient for *_, coefficient in commit.terms]
        yield {
            "step": commit.step,
            "loss": commit.loss,
            "eta": commit.eta,
            "decay": commit.decay,
            "terms": len(coefficients),
            "norm": math.sqrt(sum(c * c for c in coefficients)),
            "applied": commit.applied,
            "learning_rate": measured.get("learning_rate"),
            "gradient_rms": measured.get("gradient_rms"),
            "seconds": measured.get("seconds"),
            "steps": [step for step, *_ in commit.terms],
            "indices": [index for _, index, _ in commit.terms],
            "coefficients": coefficients,
            "hash": commit.hash.hex(),
        }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(*_COLUMNS, "hash", box=None)
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in _COLUMNS), row["hash"][:12])
    return table


def _cell(value: Any) -> str:
    if _missing(value):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
