"""`zoray log`: the ledger as a table, as JSON lines, or as a Parquet file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.restore import open_ledger
from zoray.errors import RunError
from zoray.ledger import Ledger
from zoray.runs import RunFolder

_LEDGER = ("step", "loss", "eta", "decay", "terms", "norm", "applied")
_METRICS = ("learning_rate", "gradient_rms", "seconds")
_WIDE = 112
"""Columns of a terminal that has room for all of them."""


def log(run: str, as_json: bool, parquet: Path | None, last: int | None, output_dir: str) -> None:
    """Show the commits of a run, beside the metrics of their steps where there are any.

    Only the ledger and the metrics are read: the model, the data and config.yaml may be gone or changed.

    Raises:
        RunError: the run cannot be found, or the Parquet file cannot be written.
        LedgerError: its ledger is damaged.
    """
    folder = RunFolder.find(run, output_dir)
    ledger = open_ledger(folder)
    metrics = {int(row["step"]): row for row in folder.rows("steps")}
    start = max(0, ledger.next_step - last) if last else 0
    rows = _rows(ledger, start, metrics)
    if parquet is not None:
        count = _write_parquet(list(rows), parquet)
        Console(highlight=False, soft_wrap=True).print(f"{count} commits: {parquet}", markup=False)
    elif as_json:
        for row in rows:
            print(json.dumps({key: None if _missing(value) else value for key, value in row.items()}))
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=160)
        console.print(_table(rows, wide=console.width >= _WIDE))


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
            **{key: measured.get(key) for key in _METRICS},
            "steps": [step for step, *_ in commit.terms],
            "indices": [index for _, index, _ in commit.terms],
            "coefficients": coefficients,
            "hash": commit.hash.hex(),
        }


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = {"step": pa.uint64(), "terms": pa.uint32(), "applied": pa.bool_(), "hash": pa.string()}
    lists = {
        "steps": pa.list_(pa.uint64()),
        "indices": pa.list_(pa.uint32()),
        "coefficients": pa.list_(pa.int8()),
    }
    names = (*_LEDGER, *_METRICS, *lists, "hash")
    # Written down, so that a run without metrics, or without steps, has the same columns.
    schema = pa.schema([(name, {**numbers, **lists}.get(name, pa.float64())) for name in names])
    try:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    except OSError as error:
        raise RunError(f"The Parquet file cannot be written: {error}.", where=str(path)) from error
    return len(rows)


def _table(rows: Iterator[dict[str, Any]], wide: bool) -> Table:
    columns = (*_LEDGER, *_METRICS) if wide else _LEDGER
    note = None if wide else f"{', '.join(_METRICS)}: in a wider terminal, or with --json"
    table = Table(box=None, caption=note, caption_justify="left")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("hash", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns), row["hash"][:12])
    return table


def _cell(value: Any) -> str:
    if _missing(value):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))
