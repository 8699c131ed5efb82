"""What travels to a cluster and what comes back, without any cluster."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.jobs.driver import CONFIG, SUBMISSION, check_versions
from launch.jobs.jobserver import RUN, _lines, _own
from launch.jobs.remote import _placed, jobs_of
from launch.jobs.submit import _parcel
from launch.jobs.wire import MARK, heard, packed, unpacked
from zoray import __version__
from zoray.config import RunConfig, load
from zoray.errors import ConfigError, ResourceError, ZorayError
from zoray.identity import code_digest

TEXT = st.none() | st.text()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder: a configuration, data and code beside it."""
    folder = tmp_path / "project"
    (folder / "my_model").mkdir(parents=True)
    (folder / "my_model" / "modeling.py").write_text("answer = 42\n")
    (folder / "text.jsonl").write_text('{"text": "a"}\n')
    (folder / ".git").mkdir()
    (folder / "run.yaml").write_text(
        "model: my_model\nmax_steps: 3\nrun_name: far\ntask: {kind: causal_lm, train: text.jsonl, eval: s3://b/e.jsonl}\n"
    )
    return folder


@given(st.sampled_from(ZorayError.__subclasses__()), st.text(), TEXT, TEXT)
def test_an_error_comes_back_as_it_was(
    kind: type[ZorayError], what: str, where: str | None, advice: str | None
) -> None:
    error = kind(what, where=where, advice=advice)
    message = heard(MARK + json.dumps(packed(error)))
    assert message is not None
    back = unpacked(message)
    assert (type(back), str(back), back.exit_code) == (kind, str(error), kind.exit_code)


def test_an_error_of_a_kind_not_known_here_is_still_one() -> None:
    back = unpacked({"kind": "Annotations", "what": "it rained", "where": None, "advice": None})
    assert type(back) is ZorayError and str(back) == "it rained"


@given(st.text())
def test_other_output_is_no_message(line: str) -> None:
    assert heard(line) is None or line.startswith(MARK)


def test_only_the_configuration_travels(project: Path) -> None:
    config = load(project / "run.yaml")
    with _parcel(config, None, any_version=False) as folder:
        assert {path.name for path in folder.rglob("*")} == {CONFIG, SUBMISSION}
        assert load(folder / CONFIG) == config
        submission = json.loads((folder / SUBMISSION).read_text())
    assert not folder.exists()
    assert (submission["version"], submission["code"]) == (__version__, code_digest())
    assert submission["local"] == {"model": str(project / "my_model"), "task.train": str(project / "text.jsonl")}


def test_the_users_own_code_travels_where_asked_for(project: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.jsonl").write_text('{"text": "a"}\n')
    config = load(project / "run.yaml", [f"task.train={tmp_path / 'elsewhere.jsonl'}"])
    (project / ".gitignore").write_text("*.json\n.*\n")
    for name in ("runs", "my_model/runs"):
        (project / name).mkdir()
    with _parcel(config, project, any_version=True) as folder:
        assert (folder / "my_model" / "modeling.py").is_file() and not (folder / ".git").exists()
        # Those of Zoray on this machine, and a package of that name.
        assert not (folder / "runs").exists() and (folder / "my_model" / "runs").is_dir()
        # Ray leaves out what these lines say; the last one counts.
        assert (folder / ".gitignore").read_text().splitlines()[-2:] == [f"!/{CONFIG}", f"!/{SUBMISSION}"]
        # There it is found beside the configuration again, wherever Ray unpacks it.
        there = load(folder / CONFIG)
        submission = json.loads((folder / SUBMISSION).read_text())
        assert there.model == str(folder / "my_model")
    # The cluster looks whether both are there.
    assert submission["local"] == {"model": str(project / "my_model"), "task.train": config.task.train}
    assert there.task.eval == "s3://b/e.jsonl" and there.task.train == config.task.train


def test_a_working_dir_that_cannot_be_copied_is_refused(project: Path) -> None:
    (project / "dangling").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="cannot be taken along"), _parcel(load(project / "run.yaml"), project, False):
        pass


def test_a_working_dir_must_be_a_folder(project: Path) -> None:
    config = load(project / "run.yaml")
    with pytest.raises(ConfigError, match="is not a folder"), _parcel(config, project / "run.yaml", False):
        pass


def test_another_version_or_code_is_refused_or_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    same = {"version": __version__, "code": code_digest(), "any_version": False}
    check_versions(same)
    for other, word in (({"version": "0.0.1"}, "version"), ({"code": "beef"}, "code")):
        with pytest.raises(ResourceError, match=f"another {word} of Zoray") as refused:
            check_versions({**same, **other})
        assert code_digest() in str(refused.value) and next(iter(other.values())) in str(refused.value)
        check_versions({**same, **other, "any_version": True})
        assert f"warning: The cluster has another {word}" in capsys.readouterr().out


def job(submission_id: str, entrypoint: str = "zoray drive", **metadata: str) -> Any:
    return SimpleNamespace(submission_id=submission_id, entrypoint=entrypoint, metadata=metadata)


def test_the_jobs_of_a_run_are_found() -> None:
    first, second = job("zoray-a", **{RUN: "a"}), job("zoray-a-2", **{RUN: "a"}, zoray_output_dir="/v")
    question = job("zoray-ask-1", "zoray answer -- status b")
    rayjob = job("rayjob-x", "zoray train /config/run.yaml run_name=b")
    jobs = [first, question, rayjob, second]
    assert jobs_of(jobs, "a") == [first, second]
    assert jobs_of(jobs, "b") == [rayjob]
    assert jobs_of(jobs, "run") == []
    assert jobs_of([job("x", "python train.py --env b"), job("y", "zoray plot b")], "b") == []
    assert _placed(jobs, ("scale", "a", "--", "3")) == ("scale", "a", "--output-dir", "/v", "--", "3")
    assert _placed(jobs, ("status", "a", "--output-dir", "/w")) == ("status", "a", "--output-dir", "/w")
    assert _placed(jobs, ("list",)) == ("list",)


@given(st.lists(st.text(st.characters(exclude_characters="\n"), max_size=5)), st.integers(1, 7))
def test_lines_come_whole_however_they_are_cut(lines: list[str], size: int) -> None:
    text = "".join(f"{line}\n" for line in lines)

    async def chunks() -> Any:
        for start in range(0, len(text), size):
            yield text[start : start + size]

    assert list(_lines(chunks())) == lines


def test_what_ray_says_before_the_job_begins_is_left_out() -> None:
    lines = ["Runtime env is setting up.", "Running entrypoint for job zoray-a: zoray drive", "step 0/3", "step 1/3"]
    assert list(_own(iter(lines))) == lines[2:]
    assert list(_own(iter(lines[:1]))) == []


def test_a_configuration_that_names_nothing_here(project: Path) -> None:
    config = RunConfig.model_validate(
        {"model": "org/name", "max_steps": 1, "task": {"kind": "causal_lm", "train": "/volume/x.jsonl"}}
    )
    with _parcel(config, None, any_version=False) as folder:
        assert json.loads((folder / SUBMISSION).read_text())["local"] == {}
        assert load(folder / CONFIG) == config
