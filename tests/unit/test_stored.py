"""Data, models and exports on a real S3 server: as if they lay here, and every way in which they may not be had."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from launch.export import export
from launch.preflight import check_paths
from tests.conftest import S3, SENTENCES, make_model
from tests.unit.run_builder import BuiltRun, build_run, write_data
from zoray import stores
from zoray.config import RunConfig
from zoray.errors import DataError, ModelError, RunError
from zoray.models import load_model, load_tokenizer
from zoray.models.fetched import fetched
from zoray.replica import base_digest
from zoray.tasks import load_task
from zoray.tasks.source import find_files, read_rows

DEAD = "?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
LORA = {"lora": {"r": 2, "target_modules": ["c_attn"]}}


def config(model: Path | str, train: Path | str = "t", **keys: Any) -> RunConfig:
    task = {"kind": "causal_lm", "train": str(train), "max_length": 8, **keys.pop("task", {})}
    return RunConfig.model_validate({"model": str(model), "max_steps": 1, "task": task, **keys})


def cells(uri: str) -> list[str]:
    return [cell for chunk in read_rows(find_files(uri), {"text": "text"}) for cell in chunk.columns["text"]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model("gpt2", tmp_path / "base")


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it, and the store is gone."""
    return lambda: monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")


# ---- data ----


def test_data_of_every_kind(s3: S3, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in SENTENCES).encode()
    pq.write_table(pa.table({"text": SENTENCES}), tmp_path / "p.parquet")
    s3.write(lines, "data", "a.jsonl")
    s3.write(gzip.compress(lines), "data", "b.jsonl.gz")
    s3.write(b"text\n" + "\n".join(SENTENCES).encode(), "data", "c.csv")
    s3.write((tmp_path / "p.parquet").read_bytes(), "data", "d.parquet")
    s3.write(b"not data", "data", "README.md")
    s3.write(lines, "data", "deeper", "e.jsonl")
    for name in ("a.jsonl", "b.jsonl.gz", "c.csv", "d.parquet"):
        assert cells(s3.uri("data", name)) == SENTENCES
    assert cells(s3.uri("data")) == cells(s3.uri("data") + "/") == SENTENCES * 4


def test_a_task_on_a_store_is_the_same_task(s3: S3, tmp_path: Path, model: Path) -> None:
    paths = write_data(tmp_path, "causal_lm")
    s3.write(Path(paths["train"]).read_bytes(), "train.jsonl")
    tokenizer = load_tokenizer(config(model))
    here = load_task(config(model, paths["train"]), tokenizer)
    there = load_task(config(model, s3.uri("train.jsonl")), tokenizer)
    assert there.digest == here.digest and there.train_size == here.train_size


def test_changed_data_of_equal_size_is_read_again(s3: S3, model: Path) -> None:
    """Within a second, which is as finely as stores tell the time."""
    tokenizer, digests = load_tokenizer(config(model)), []
    for text in ("a good film", "a dull film", "a good film"):
        s3.write(json.dumps({"text": " ".join([text] * 20)}).encode(), "train.jsonl")
        digests.append(load_task(config(model, s3.uri("train.jsonl")), tokenizer).digest)
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("{bucket}/no.jsonl", "no such file or folder"),
        ("{bucket}/folder", "found: a.txt"),
        ("no-such-bucket/x.jsonl", "no bucket"),
        ("{bucket}/x.jsonl" + DEAD, "cannot be reached"),
        ("{bucket}/x.jsonl?nonsense=1", "cannot be opened"),
    ],
)
def test_data_that_cannot_be_had(s3: S3, model: Path, where: str, words: str) -> None:
    s3.write(b"x", "folder", "a.txt")
    with pytest.raises(DataError, match=words) as caught:
        check_paths(config(model, "s3://" + where.format(bucket=s3.bucket)))
    assert str(caught.value.where).startswith("s3://") and "?" not in str(caught.value.where)
    assert caught.value.advice


def test_bad_rows_and_lost_objects_are_named(s3: S3) -> None:
    s3.write(b'{"text": "a"}\n{"text": 7}\n', "bad.jsonl")
    with pytest.raises(DataError) as caught:
        cells(s3.uri("bad.jsonl"))
    assert caught.value.where == f"s3://{s3.bucket}/bad.jsonl, row 2, column text"
    found = find_files(s3.uri("bad.jsonl"))
    s3.delete("bad.jsonl")
    with pytest.raises(DataError, match="does not exist") as gone:
        next(read_rows(found, {"text": "text"}))
    assert gone.value.where == f"s3://{s3.bucket}/bad.jsonl"


def test_data_without_credentials(s3: S3) -> None:
    s3.write(b'{"text": "a"}\n', "a.jsonl")
    with s3.strict(), pytest.raises(DataError, match="refuses access") as caught:
        find_files(s3.uri("a.jsonl"))
    assert caught.value.where == s3.uri("a.jsonl")


# ---- models ----


def test_a_model_on_a_store_has_the_same_identity(s3: S3, model: Path) -> None:
    uri = s3.put(model, "models", "tiny")
    ours, theirs = load_model(config(uri)), load_model(config(model))
    assert base_digest(ours) == base_digest(theirs)
    assert load_tokenizer(config(uri)).get_vocab() == load_tokenizer(config(model)).get_vocab()


def test_it_is_downloaded_once(s3: S3, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, downloads, whole = s3.put(model, "m"), list[str](), stores.fetch

    def counted(where: str, *rest: Any) -> None:
        downloads.append(where)
        whole(where, *rest)

    monkeypatch.setattr(stores, "fetch", counted)
    with ThreadPoolExecutor(8) as pool:
        places = set(pool.map(fetched, [uri] * 8))
    assert len(places) == 1 and downloads == [uri]
    place = places.pop()
    assert sorted(path.name for path in place.iterdir()) == sorted(path.name for path in model.iterdir())


def test_a_model_that_changes_is_another_one(s3: S3, model: Path) -> None:
    uri = s3.put(model, "m")
    first, before = fetched(uri), base_digest(load_model(config(uri)))
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    s3.write(bytes(data), "m", "model.safetensors")
    assert fetched(uri) != first
    assert base_digest(load_model(config(uri))) != before


def test_only_what_is_needed_is_downloaded(s3: S3, model: Path) -> None:
    uri = s3.put(model, "m")
    for name in ("pytorch_model.bin", "onnx/model.onnx", "checkpoint-5/model.safetensors"):
        s3.write(b"x", "m", name)
    s3.write(b"y", "m", "extra", "modeling.py")
    names = {path.relative_to(fetched(uri)).as_posix() for path in fetched(uri).rglob("*") if path.is_file()}
    assert names == {*(path.name for path in model.iterdir()), "extra/modeling.py"}
    s3.delete("m", "model.safetensors")
    assert "pytorch_model.bin" in {path.name for path in fetched(uri).iterdir()}


def test_a_download_that_breaks_off_is_not_seen(s3: S3, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, whole = s3.put(model, "m"), stores.fetch
    cache = stores.cache_root() / "models"

    def broken(where: str, names: list[str], folder: Path) -> None:
        whole(where, names[:2], folder)
        raise stores.StoreError("The store cannot be reached", "Check it.")

    def short(where: str, names: list[str], folder: Path) -> None:
        whole(where, names, folder)
        os.truncate(folder / "model.safetensors", 100)

    for fetch in (broken, short):
        with monkeypatch.context() as patch:
            patch.setattr(stores, "fetch", fetch)
            with pytest.raises(ModelError):
                fetched(uri)
        assert [path for path in cache.iterdir() if path.is_dir()] == []
    assert base_digest(load_model(config(uri))) == base_digest(load_model(config(model)))


def test_what_a_killed_download_left_behind_goes(s3: S3, model: Path) -> None:
    uri = s3.put(model, "m")
    place = fetched(uri)
    left_behind = place.with_name(f".{place.name}.4711")
    place.rename(left_behind)
    assert fetched(uri) == place and not left_behind.exists()


def test_no_room(s3: S3, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3.put(model, "m")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    with pytest.raises(ModelError, match="GiB are free") as caught:
        fetched(uri)
    assert "ZORAY_CACHE" in str(caught.value.advice)


def test_a_store_that_is_gone(s3: S3, model: Path, dead: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A run does not begin without it; a replica that joins later takes what its machine has, and says so."""
    uri = s3.put(model, "m")
    place = fetched(uri)
    dead()
    with caplog.at_level(logging.WARNING):
        assert fetched(uri) == place
    assert "cannot be reached" in caplog.text and str(place) in caplog.text
    with pytest.raises(ModelError, match="cannot be reached"):
        check_paths(config(uri))
    with pytest.raises(ModelError, match="cannot be reached"):
        fetched(s3.uri("another"))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "it has nothing"),
        ({"model.safetensors": b"x"}, "it has model.safetensors"),
        ({"adapter_config.json": b"{}"}, "no config.json"),
        (None, "no bucket"),
    ],
)
def test_what_is_no_model(s3: S3, files: dict[str, bytes] | None, words: str) -> None:
    for name, content in (files or {}).items():
        s3.write(content, "m", name)
    uri = "s3://no-such-bucket/m" if files is None else s3.uri("m")
    for call in (lambda: check_paths(config(uri)), lambda: load_tokenizer(config(uri))):
        with pytest.raises(ModelError, match=words) as caught:
            call()
        assert caught.value.where == "model" and caught.value.advice


def test_a_check_downloads_nothing(s3: S3, model: Path, tmp_path: Path) -> None:
    uri = s3.put(model, "m")
    check_paths(config(uri, write_data(tmp_path, "causal_lm")["train"]))
    assert not (stores.cache_root() / "models").exists()


def test_code_that_comes_with_the_model(s3: S3, model: Path) -> None:
    (model / "own.py").write_text(
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class OwnConfig(GPT2Config):\n    model_type = 'own'\n"
        "class Own(GPT2LMHeadModel):\n    config_class = OwnConfig\n"
    )
    settings = json.loads((model / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (model / "config.json").write_text(json.dumps(settings))
    uri = s3.put(model, "m")
    with pytest.raises(ModelError, match="own Python code"):
        load_model(config(uri))
    assert type(load_model(config(uri, trust_remote_code=True))).__name__ == "Own"


# ---- exports ----


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuiltRun:
    return build_run(tmp_path_factory.mktemp("run"), max_steps=2)


def exported(s3: S3, to: Path, *names: str) -> Path:
    """What is on the store, as a folder."""
    stores.fetch(s3.uri(*names), [each.name for each in stores.entries(s3.uri(*names))], to)
    return to


def test_an_export_is_the_same_folder(s3: S3, built: BuiltRun, tmp_path: Path, capsys: Any) -> None:
    export("tiny", s3.uri("exports", "one"), None, False, built.output_dir)
    assert s3.uri("exports", "one") in capsys.readouterr().out
    export("tiny", tmp_path / "here", None, False, built.output_dir)
    there = exported(s3, tmp_path / "there", "exports", "one")
    for path in (tmp_path / "here").iterdir():
        assert (there / path.name).read_bytes() == path.read_bytes(), path.name
    again, here = (load_model(config(place)) for place in (s3.uri("exports", "one"), tmp_path / "here"))
    assert base_digest(again) == base_digest(here)


def test_an_adapter_names_the_model_it_belongs_to(s3: S3, model: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    uri = s3.put(model, "m")
    run = build_run(tmp_path / "run", max_steps=1, base=uri, trainable=LORA, learning_rate=1.0)
    export("tiny", s3.uri("adapter"), None, True, run.output_dir)
    folder = exported(s3, tmp_path / "there", "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == uri
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder)
    assert any(bool(torch.any(p)) for name, p in loaded.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    ("found", "words"), [("config.json", "name another one"), ("model.safetensors", "broken-off upload")]
)
def test_a_place_that_is_taken(s3: S3, built: BuiltRun, found: str, words: str) -> None:
    s3.write(b"x", "exports", "one", found)
    with pytest.raises(RunError, match=found) as caught:
        export("tiny", s3.uri("exports", "one"), None, False, built.output_dir)
    assert words in str(caught.value.advice)
    assert s3.names() == [f"exports/one/{found}"]


def test_an_export_that_breaks_off_is_no_model(s3: S3, built: BuiltRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import fs

    whole, left = fs.copy_files, iter(range(2))

    def copy(*arguments: Any, **keys: Any) -> None:
        if next(left, None) is None:
            raise OSError("AWS Error NETWORK_CONNECTION during UploadPart operation: gone")
        whole(*arguments, **keys)

    monkeypatch.setattr(fs, "copy_files", copy)
    with pytest.raises(RunError, match="cannot be reached") as caught:
        export("tiny", s3.uri("out"), None, False, built.output_dir)
    assert "no config.json" in str(caught.value.advice)
    assert len(s3.names("out/")) == 2 and "out/config.json" not in s3.names()


@pytest.mark.parametrize(
    ("uri", "words"), [("s3://no-such-bucket/out", "no bucket"), ("s3://b/out" + DEAD, "cannot be reached")]
)
def test_a_place_that_cannot_be_written(s3_server: str, built: BuiltRun, uri: str, words: str) -> None:
    with pytest.raises(RunError, match=words) as caught:
        export("tiny", uri, None, False, built.output_dir)
    assert caught.value.where == "--to" and caught.value.advice
