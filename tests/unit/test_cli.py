"""The command: what it says, where it says it and its exit status, for good input and bad."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from launch.cli import main
from tests.unit.run_builder import BuiltRun, build_run, write_config
from zoray import __version__
from zoray.errors import RunError, ZorayError
from zoray.ledger import Ledger
from zoray.runs import RunFolder


class Said(NamedTuple):
    status: int
    out: str
    err: str


Zoray = Callable[..., Said]


@pytest.fixture
def zoray(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Zoray:
    """`zoray(word, ...)`: run the command in this process, in an empty folder."""
    # Set first, so that what --debug sets is taken back.
    monkeypatch.setenv("ZORAY_DEBUG", "")
    monkeypatch.setenv("COLUMNS", "200")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)

    def run(*words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["zoray", *words])
        capsys.readouterr()
        try:
            main()
            status: Any = 0
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr()
        return Said(int(status or 0), said.out, said.err)

    return run


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuiltRun:
    return build_run(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def copied(built: BuiltRun, tmp_path: Path) -> RunFolder:
    """A copy of the run to be spoilt, as tmp_path/runs/tiny."""
    return RunFolder(Path(shutil.copytree(built.folder.path, tmp_path / "runs" / "tiny")))


def runs(folder: RunFolder) -> tuple[str, str]:
    return "--output-dir", str(folder.path.parent)


def edit(folder: RunFolder, **keys: Any) -> None:
    """Change keys of config.yaml as a user might with an editor."""
    settings = yaml.safe_load(folder.config_path.read_text())
    folder.config_path.write_text(yaml.safe_dump({**settings, **keys}))


# ---- the command itself ----


def test_version(zoray: Zoray) -> None:
    assert zoray("--version") == (0, f"zoray {__version__}\n", "")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["export", "--help"], ["tune", "--help"]])
def test_nothing_heavy_is_imported_to_answer_at_once(words: list[str]) -> None:
    heavy = ["torch", "ray", "transformers", "numpy", "pyarrow", "safetensors", "matplotlib", "yaml", "zoray.config"]
    if words[0].startswith("-"):
        # Typer itself imports it for a command that takes a path.
        heavy.append("pydantic")
    code = (
        f"import sys\nfrom launch.cli import main\nsys.argv = ['zoray', *{words!r}]\n"
        f"try: main()\nexcept SystemExit: print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_the_documents_name_is_there() -> None:
    from launch.cli import app

    there = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    root = Path(__file__).parents[2]
    for path in (root / "README.md", root / "CHANGELOG.md", root / "k8s" / "README.md", *(root / "docs").glob("*.md")):
        named = set(re.findall(r"(?:`|^|&& )zoray ([a-z]+)\b", path.read_text(), flags=re.MULTILINE))
        assert named <= there, (path.name, named - there)
        assert named or path.parent.name == "docs"


def test_help_names_every_command(zoray: Zoray) -> None:
    said = zoray("--help")
    assert said.status == 0
    for command in ("train", "resume", "eval", "export", "verify", "log", "plot", "watch", "monitor", "render"):
        assert command in said.out


@pytest.mark.parametrize(
    "words", [["fly"], ["train"], ["export", "a"], ["log", "a", "--last", "0"], ["eval", "a", "--step", "x"]]
)
def test_usage_errors_exit_2(zoray: Zoray, words: list[str]) -> None:
    said = zoray(*words)
    assert said.status == 2
    assert "Usage" in said.err


@pytest.mark.parametrize("kind", [ZorayError, *ZorayError.__subclasses__()])
def test_an_error_is_a_short_message_and_its_exit_status(
    zoray: Zoray, monkeypatch: pytest.MonkeyPatch, kind: type[ZorayError]
) -> None:
    def fail(*arguments: Any) -> None:
        raise kind("It broke [bold].", where="here", advice="mend it")

    monkeypatch.setattr("launch.plot.plot", fail)
    said = zoray("plot", "a")
    assert said == (kind.exit_code, "", "error: It broke [bold].\n  where: here\n  to do: mend it\n")


@pytest.mark.parametrize("by", ["option", "environment"])
def test_debug_shows_the_traceback(zoray: Zoray, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    if by == "environment":
        monkeypatch.setenv("ZORAY_DEBUG", "1")
    with pytest.raises(RunError):
        zoray(*(["--debug"] if by == "option" else []), "plot", "nowhere")


def test_an_unexpected_exception_keeps_its_traceback(zoray: Zoray, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyError("unexpected")

    monkeypatch.setattr("launch.plot.plot", fail)
    with pytest.raises(KeyError, match="unexpected"):
        zoray("plot", "a")


def test_a_misspelt_key_names_the_near_one(zoray: Zoray, tmp_path: Path) -> None:
    path = write_config(tmp_path, directoins=3)
    said = zoray("train", str(path))
    assert said.status == 2
    assert "directoins" in said.err and "directions" in said.err.replace("directoins", "")
    assert str(path) in said.err and "Traceback" not in said.err
    assert not (tmp_path / "runs").exists()


def test_overrides_reach_the_configuration(zoray: Zoray, tmp_path: Path) -> None:
    said = zoray("train", str(write_config(tmp_path)), "learning_rate=fast", "task.max_length=0")
    assert said.status == 2
    assert "learning_rate" in said.err and "task.max_length" in said.err


# ---- finding a run ----


@pytest.mark.parametrize("command", ["resume", "eval", "verify", "log", "plot", "export"])
def test_an_unknown_run_lists_those_there_are(zoray: Zoray, built: BuiltRun, command: str) -> None:
    more = ["--to", "x"] if command == "export" else []
    said = zoray(command, "tinny", *more, *runs(built.folder))
    assert said.status == 6
    assert "'tinny'" in said.err and "tiny" in said.err.replace("tinny", "")
    said = zoray(command, "tinny", *more)
    assert said.status == 6 and "zoray train" in said.err


def test_a_run_is_found_by_path_and_by_name_under_runs(zoray: Zoray, built: BuiltRun) -> None:
    by_path = zoray("log", str(built.folder.path), "--json")
    shutil.copytree(built.folder.path, "runs/tiny")
    by_name = zoray("log", "tiny", "--json")
    assert by_path == by_name and by_path.status == 0
    assert len(by_path.out.splitlines()) == built.config.max_steps


# ---- eval, and what every command that replays has in common ----


def test_eval_gives_what_the_run_measured(zoray: Zoray, built: BuiltRun) -> None:
    for step, expected in built.evaluations.items():
        found = json.loads(zoray("eval", "tiny", "--json", "--step", str(step), *runs(built.folder)).out)
        assert found["step"] == step and found["count"] == expected.count
        assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)
        assert found["standard_error"] == pytest.approx(expected.standard_error, rel=1e-5)
    text = zoray("eval", "tiny", *runs(built.folder)).out
    assert f"{expected.loss:.4f} ± {expected.standard_error:.4f}" in text and "accuracy" not in text


def test_eval_of_a_classification_says_the_accuracy(zoray: Zoray, tmp_path: Path) -> None:
    run = build_run(tmp_path, "bert", "classification", max_steps=2)
    said = zoray("eval", "tiny", *runs(run.folder))
    result = run.evaluations[2]
    assert said.status == 0 and result.correct > 0
    assert f"accuracy {result.correct / result.count:.1%}" in said.out


def test_eval_without_held_out_data(zoray: Zoray, copied: RunFolder) -> None:
    settings = yaml.safe_load(copied.config_path.read_text())
    edit(copied, task={**settings["task"], "eval": None})
    said = zoray("eval", "tiny", *runs(copied))
    assert said.status == 2 and "task.eval" in said.err


@pytest.mark.parametrize("step", ["7", "-1"])
def test_a_step_that_is_not_in_the_ledger(zoray: Zoray, built: BuiltRun, step: str) -> None:
    said = zoray("eval", "tiny", "--step", step, *runs(built.folder))
    assert said.status == 6
    assert f"no step {step}" in said.err and "0 to 6" in said.err


def test_a_config_edited_to_other_mathematics_is_refused(zoray: Zoray, copied: RunFolder) -> None:
    edit(copied, epsilon=0.5, replicas=7)
    said = zoray("verify", "tiny", *runs(copied))
    assert said.status == 5
    assert "epsilon = 0.5" in said.err and "0.001" in said.err and "replicas" not in said.err


def test_a_config_edited_to_another_kind_of_training_is_refused(zoray: Zoray, tmp_path: Path) -> None:
    lora = {"lora": {"r": 2, "target_modules": ["c_attn"]}}
    run = build_run(tmp_path, max_steps=1, trainable=lora)
    edit(run.folder, trainable="full")
    said = zoray("verify", "tiny", *runs(run.folder))
    assert said.status == 5 and "has no trainable.lora" in said.err


def test_a_config_edited_elsewhere_is_not_refused(zoray: Zoray, copied: RunFolder) -> None:
    edit(copied, replicas=7, max_steps=100)
    assert zoray("verify", "tiny", *runs(copied)).status == 0


def test_a_model_that_was_moved_is_taken_for_what_its_weights_are(
    zoray: Zoray, built: BuiltRun, copied: RunFolder, tmp_path: Path
) -> None:
    place = shutil.copytree(built.config.model, tmp_path / "elsewhere")
    edit(copied, model=str(place))
    said = zoray("verify", "tiny", *runs(copied))
    assert said.status == 0
    weights = place / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    said = zoray("verify", "tiny", *runs(copied))
    assert said.status == 5 and "another model" in said.err


def test_a_damaged_ledger_names_the_offset(zoray: Zoray, copied: RunFolder) -> None:
    path = copied.ledger / "commits.bin"
    with Ledger.open(copied.ledger, repair=False) as ledger:
        size = len(next(ledger.commits()).encode())
    data = bytearray(path.read_bytes())
    # Inside the third record from the end, so that it cannot be a torn tail.
    offset = len(data) - 3 * size
    data[offset + 30] ^= 1
    path.write_bytes(data)
    for command in ("verify", "log", "eval"):
        said = zoray(command, "tiny", *runs(copied))
        assert said.status == 5
        assert f"byte {offset}" in said.err and "commits.bin" in said.err
    assert path.read_bytes() == data


def test_a_torn_tail_is_a_warning_and_is_left_alone(zoray: Zoray, copied: RunFolder) -> None:
    path = copied.ledger / "commits.bin"
    torn = path.read_bytes() + struct.pack("<I", 71) + b"\1\2"
    path.write_bytes(torn)
    said = zoray("log", "tiny", "--json", *runs(copied))
    assert said.status == 0 and len(said.out.splitlines()) == 6
    assert "warning: torn record of step 6" in said.err
    assert path.read_bytes() == torn


@pytest.mark.parametrize("command", ["verify", "log", "eval"])
def test_a_run_that_ended_before_its_first_step(zoray: Zoray, copied: RunFolder, command: str) -> None:
    shutil.rmtree(copied.ledger)
    said = zoray(command, "tiny", *runs(copied))
    assert said.status == 6 and "no ledger" in said.err


def test_the_command_as_a_process(built: BuiltRun) -> None:
    words = [sys.executable, "-m", "launch.cli", "plot", "nowhere", *runs(built.folder)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "ZORAY_DEBUG": ""})
    assert done.returncode == 6 and done.stdout == ""
    assert done.stderr.startswith("error: There is no run 'nowhere'.")
