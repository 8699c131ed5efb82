"""`zoray verify`: what it proves, and everything that makes it refuse."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.verify import recorded_digests, verify
from tests.unit.run_builder import BuiltRun, build_run
from zoray.commits import HEADER_SIZE
from zoray.digest import digest
from zoray.errors import LedgerError, NumericsError, RunError, ZorayError
from zoray.ledger import Ledger
from zoray.runs import RunFolder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuiltRun:
    return build_run(tmp_path_factory.mktemp("verify"), snapshots=(2, 4))


@pytest.fixture
def copied(built: BuiltRun, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(built.folder.path, tmp_path / "runs" / "tiny")))


def refused(folder: RunFolder, kind: type[ZorayError]) -> str:
    with pytest.raises(kind) as caught:
        verify(str(folder.path), "runs")
    return str(caught.value)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(folder: RunFolder, count: int, *, head: bool = True) -> None:
    """Cut the ledger off after so many commits, as a file system that lost them would."""
    with Ledger.open(folder.ledger, repair=False) as ledger:
        lost = sum(len(commit.encode()) for commit in ledger.commits(count))
    path = folder.ledger / "commits.bin"
    os.truncate(path, path.stat().st_size - lost)
    if not head:
        (folder.ledger / "head").unlink()


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("gpt2", {"dtype": "bfloat16"}),
        ("llama", {"direction": {"kind": "rademacher"}, "seed": 9}),
        ("gpt2", {"trainable": "bias_and_norm"}),
        ("llama", {"trainable": {"prefix": {"num_virtual_tokens": 2}}, "epsilon": 0.1}),
        ("opt", {"trainable": {"sparse": {"sparsity": 0.6}}, "dtype": "bfloat16"}),
        ("gpt2", {"trainable": {"blocks": {"count": 2, "steps": 2}}}),
        ("llama", {"direction": {"rank": 3}, "trainable": {"lora": {"r": 2, "target_modules": ["q_proj"]}}}),
    ],
)
def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, keys: dict[str, Any]) -> None:
    run = build_run(tmp_path, model, max_steps=3, learning_rate=1.0, snapshots=(1,), **keys)
    assert len({*run.digests.values()}) == 4
    verify("tiny", run.output_dir)
    out = capsys.readouterr().out
    assert "3 commits" in out and "DIFFERS" not in out
    rows = [line.split() for line in out.splitlines()]
    for step, who in ((1, "snapshot"), (3, "replicas")):
        assert [str(step), who, *[f"{run.digests[step]:016x}"] * 2] in rows
    assert rows[-1][-1] == f"{run.digests[3]:016x}"


def test_a_classifier_s_inputs_are_found_without_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were those of training examples, which the ledger's header knows."""
    run = build_run(tmp_path, "bert", "classification", max_steps=2, learning_rate=1.0)
    assert "classifier.weight" in run.replica.directions.inputs
    with Ledger.open(run.folder.ledger, repair=False) as ledger:
        texts = ledger.header["texts"]
    assert texts.keys() == {"input_ids", "attention_mask"}
    assert (len(texts["input_ids"]), len(texts["input_ids"][0])) == (64, 8)
    for part in ("train", "eval"):
        (tmp_path / f"{part}.jsonl").unlink()
    monkeypatch.setenv("ZORAY_CACHE", str(tmp_path / "another"))
    verify("tiny", run.output_dir)
    assert f"{run.digests[2]:016x}" in capsys.readouterr().out.splitlines()[-1]


def test_without_any_record_it_says_so(built: BuiltRun, copied: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copied.snapshots)
    (copied.path / "metrics" / "digests.jsonl").unlink()
    verify(str(copied.path), "runs")
    out = capsys.readouterr().out
    assert "no digest was recorded" in out
    assert f"{built.digests[6]:016x}" in out


def test_a_run_without_a_step(built: BuiltRun, copied: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    cut(copied, 0)
    shutil.rmtree(copied.snapshots)
    (copied.path / "metrics" / "digests.jsonl").unlink()
    verify(str(copied.path), "runs")
    assert f"the weights at step 0 have digest {built.digests[0]:016x}" in capsys.readouterr().out


def test_replay_starts_from_the_base_model(built: BuiltRun, copied: RunFolder) -> None:
    """A snapshot with other weights that is sound in itself is found out, where resuming would trust it."""
    place = copied.snapshots / "step-2"
    state = load_file(place / "weights.safetensors")
    name = sorted(state)[0]
    state[name].view(torch.int32).flatten()[0] ^= 1
    save_file(state, place / "weights.safetensors")
    info = json.loads((place / "snapshot.json").read_text())
    (place / "snapshot.json").write_text(json.dumps({**info, "digest": f"{digest(state.items()):016x}"}))
    text = refused(copied, NumericsError)
    assert "step 2 (snapshot)" in text and "step 4" not in text and "step 6" not in text


@pytest.mark.parametrize("what", ["weights", "weights gone", "description", "description's digest"])
def test_a_damaged_snapshot(copied: RunFolder, what: str) -> None:
    weights, description = (copied.snapshots / "step-2" / name for name in ("weights.safetensors", "snapshot.json"))
    if what == "weights":
        flip(weights, -5)
    elif what == "weights gone":
        weights.unlink()
    elif what == "description":
        description.write_text("{")
    else:
        description.write_text(json.dumps({**json.loads(description.read_text()), "digest": "0" * 16}))
    text = refused(copied, RunError)
    assert "snapshot of step 2 is damaged" in text and "delete it" in text


def test_a_recorded_digest_that_replay_does_not_give(copied: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    copied.append("digests", {"step": 5, "digest": "0123456789abcdef"})
    text = refused(copied, NumericsError)
    assert "step 5 (replicas)" in text and "step 6" not in text
    assert capsys.readouterr().out.count("DIFFERS") == 1


@pytest.mark.parametrize("head", [True, False])
def test_commits_that_were_lost_are_missed(copied: RunFolder, capsys: pytest.CaptureFixture[str], head: bool) -> None:
    cut(copied, 5, head=head)
    text = refused(copied, LedgerError)
    assert "recorded at step 6, but the ledger ends at step 5" in text and "zoray resume tiny" in text
    assert "warning" in capsys.readouterr().err


def test_every_byte_of_the_ledger_counts(copied: RunFolder) -> None:
    """A flip behind the header of the last record looks like a torn tail; then the digest gives it away."""
    path = copied.ledger / "commits.bin"
    whole = path.read_bytes()
    with Ledger.open(copied.ledger, repair=False) as ledger:
        size = len(next(ledger.commits()).encode())
    first = len(whole) - 6 * size
    for offset in range(first, len(whole), 7):
        flip(path, offset)
        text = refused(copied, LedgerError)
        record, inside = divmod(offset - first, size)
        torn = record == 5 and inside >= HEADER_SIZE
        assert ("ledger ends at step 5" if torn else f"byte {first + record * size}") in text
        path.write_bytes(whole)


def test_another_base_model(built: BuiltRun, copied: RunFolder, tmp_path: Path) -> None:
    place = Path(shutil.copytree(built.config.model, tmp_path / "other"))
    flip(place / "model.safetensors", -1)
    text = copied.config_path.read_text()
    copied.config_path.write_text(text.replace(built.config.model, str(place)))
    assert "another model" in refused(copied, LedgerError)


def test_a_run_in_progress_is_not_accused(built: BuiltRun, copied: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest that is recorded while the model is being loaded belongs to a commit that was not read."""
    import launch.verify

    load = launch.verify.base_replica

    def slow(*arguments: Any) -> Any:
        copied.append("digests", {"step": 7, "digest": "0" * 16})
        return load(*arguments)

    monkeypatch.setattr(launch.verify, "base_replica", slow)
    verify(str(copied.path), "runs")
    assert 7 in recorded_digests(copied)
