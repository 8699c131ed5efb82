"""`zoray log` and `zoray plot`: the ledger and the metrics for people and for programs."""

from __future__ import annotations

import builtins
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.log import log
from launch.plot import plot, smooth
from tests.unit.run_builder import BuiltRun, build_run
from zoray.commits import seal
from zoray.errors import ConfigError, RunError
from zoray.ledger import Ledger
from zoray.runs import RunFolder

COLUMNS = {
    *("step", "loss", "eta", "decay", "terms", "norm", "applied", "learning_rate", "gradient_rms", "seconds"),
    *("steps", "indices", "coefficients", "hash"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuiltRun:
    return build_run(tmp_path_factory.mktemp("log"))


@pytest.fixture
def copied(built: BuiltRun, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(built.folder.path, tmp_path / "runs" / "tiny")))


def logged(capsys: pytest.CaptureFixture[str], folder: RunFolder, last: int | None = None) -> list[dict[str, Any]]:
    log(str(folder.path), True, None, last, "runs")
    return [json.loads(line, parse_constant=pytest.fail) for line in capsys.readouterr().out.splitlines()]


def test_json_says_all_that_a_commit_does(built: BuiltRun, capsys: pytest.CaptureFixture[str]) -> None:
    rows = logged(capsys, built.folder)
    with Ledger.open(built.folder.ledger, repair=False) as ledger:
        commits = list(ledger.commits())
        previous = ledger.genesis
    assert len(rows) == len(commits) == 6
    for row, commit, measured in zip(rows, commits, built.folder.rows("steps"), strict=True):
        assert row.keys() == COLUMNS
        terms = zip(row["steps"], row["indices"], row["coefficients"], strict=True)
        again = seal(row["step"], row["eta"], row["decay"], row["loss"], terms, previous)
        assert again.hash.hex() == row["hash"] == commit.hash.hex()
        assert row["applied"] is True
        assert row["gradient_rms"] == measured["gradient_rms"] and row["seconds"] == 0.25
        previous = commit.hash


def test_last(built: BuiltRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert [row["step"] for row in logged(capsys, built.folder, 2)] == [4, 5]
    assert len(logged(capsys, built.folder, 99)) == 6


def test_a_null_commit_and_a_step_without_metrics(copied: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with Ledger.open(copied.ledger, repair=True) as ledger:
        ledger.append(seal(6, 0.0, 1.0, math.nan, [(6, k, 0) for k in range(4)], ledger.head))
    row = logged(capsys, copied)[-1]
    assert row["loss"] is None and row["applied"] is False and row["norm"] == 0
    assert row["learning_rate"] is None and row["gradient_rms"] is None
    log(str(copied.path), False, None, None, "runs")
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[:2] == ["6", "-"] and line[6:10] == ["no", "-", "-", "-"]


def test_the_table(built: BuiltRun, capsys: pytest.CaptureFixture[str]) -> None:
    log("tiny", False, None, None, built.output_dir)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["step", "loss", "eta"] and len(lines) == 7
    rows = logged(capsys, built.folder)
    for line, row in zip(lines[1:], rows, strict=True):
        assert line.split()[0] == str(row["step"])
        assert line.split()[1] == f"{row['loss']:.5g}" and line.split()[-1] == row["hash"][:12]


@pytest.mark.parametrize("columns", [80, 200])
def test_the_table_on_a_terminal_is_never_cut(
    built: BuiltRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    for name, value in {"COLUMNS": str(columns), "FORCE_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    log("tiny", False, None, None, built.output_dir)
    out = capsys.readouterr().out
    assert "…" not in out
    for row in logged(capsys, built.folder):
        assert row["hash"][:12] in out
    assert ("--json" in out) == (columns == 80)


def test_log_needs_neither_the_model_nor_the_configuration(
    copied: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    copied.config_path.write_text("model: /gone\n")
    assert len(logged(capsys, copied)) == 6


def test_log_does_not_wait_for_torch(built: BuiltRun) -> None:
    code = (
        "import sys\nfrom launch.log import log\n"
        f"log({str(built.folder.path)!r}, True, None, 1, 'runs')\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_parquet(built: BuiltRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow.parquet as pq

    path = tmp_path / "ledger.parquet"
    log("tiny", False, path, None, built.output_dir)
    assert capsys.readouterr().out == f"6 commits: {path}\n"
    assert pq.read_table(path).to_pylist() == logged(capsys, built.folder)


def test_parquet_has_the_same_columns_without_metrics(built: BuiltRun, copied: RunFolder, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    (copied.path / "metrics" / "steps.jsonl").unlink()
    for name, folder in (("with", built.folder), ("without", copied)):
        log(str(folder.path), False, tmp_path / name, None, "runs")
    assert pq.read_schema(tmp_path / "with") == pq.read_schema(tmp_path / "without")


def test_parquet_that_cannot_be_written(built: BuiltRun, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written") as caught:
        log("tiny", False, tmp_path / "none" / "x.parquet", None, built.output_dir)
    assert caught.value.where == str(tmp_path / "none" / "x.parquet")


# ---- plot ----


def picture(folder: RunFolder, path: Path) -> Any:
    """The picture as an array, (height, width, 4)."""
    from matplotlib.image import imread

    plot(str(folder.path), path, "runs")
    return imread(path)


def test_the_picture_has_four_panels_with_something_in_each(built: BuiltRun, tmp_path: Path) -> None:
    pixels = picture(built.folder, tmp_path / "p.png")
    height, width = pixels.shape[:2]
    assert height > 600 and width > 900
    for panel in (pixels[: height // 2], pixels[height // 2 :]):
        for part in (panel[:, : width // 2], panel[:, width // 2 :]):
            color = part[..., :3].max(-1) - part[..., :3].min(-1)
            assert (color > 0.2).sum() > 100


def test_it_goes_beside_the_run_if_nothing_is_said(copied: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    plot(str(copied.path), None, "runs")
    place = copied.path / "plot.png"
    assert place.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{place}\n"


def test_a_name_without_png_is_a_png(built: BuiltRun, tmp_path: Path) -> None:
    plot("tiny", tmp_path / "p.xyz", built.output_dir)
    assert (tmp_path / "p.xyz").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("rows", ["one step", "no evaluation", "nan", "classification"])
def test_unusual_runs_can_be_drawn(copied: RunFolder, tmp_path: Path, rows: str) -> None:
    steps, evaluations = list(copied.rows("steps")), list(copied.rows("evaluations"))
    if rows == "one step":
        steps = steps[:1]
    elif rows == "no evaluation":
        evaluations = []
    elif rows == "nan":
        steps[2] |= {"loss": math.nan, "gradient_rms": math.nan}
        evaluations[0] |= {"standard_error": math.nan}
    else:
        evaluations = [{**row, "correct": 5} for row in evaluations]
    for table, content in (("steps", steps), ("evaluations", evaluations)):
        (copied.path / "metrics" / f"{table}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    assert picture(copied, tmp_path / "p.png").shape[0] > 600


def test_a_run_without_a_step_has_no_picture(copied: RunFolder, tmp_path: Path) -> None:
    (copied.path / "metrics" / "steps.jsonl").unlink()
    with pytest.raises(RunError, match="no step"):
        plot(str(copied.path), tmp_path / "p.png", "runs")
    assert not (tmp_path / "p.png").exists()


def test_a_picture_that_cannot_be_written(built: BuiltRun, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        plot("tiny", tmp_path / "none" / "p.png", built.output_dir)


def test_without_matplotlib(built: BuiltRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match="matplotlib") as caught:
        plot("tiny", tmp_path / "p.png", built.output_dir)
    assert caught.value.advice is not None and "zoray[plot]" in caught.value.advice


def test_smooth() -> None:
    assert smooth([3.0] * 5) == [3.0] * 5
    assert smooth([1.0, 2.0], share=0.5) == [1.0, 2.0]
    level = smooth([0.0] * 50 + [1.0] * 50)
    assert level[49] == 0 and 0 < level[50] < level[99] <= 1
    out = smooth([math.nan, 1.0, math.nan, 1.0])
    assert math.isnan(out[0]) and out[1:] == [1.0, 1.0, 1.0]
