"""Tasks: reading files, the tokenised store, which examples a probe sees, and what a batch looks like."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoray.config import RunConfig
from zoray.errors import ConfigError, DataError
from zoray.tasks import IGNORED_LABEL, batch_for, load_task, sample_ids, sampler
from zoray.tasks.source import find_files, read_rows
from zoray.tasks.store import TokenBatch, TokenStore, cache_folder, fingerprint, open_store

Rows = list[dict[str, Any]]
TEXTS = ["the quick brown fox", "a dull film", "one byte per gradient", "the ledger is the run", "a good film"]


def jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def config(task: dict[str, Any], **keys: Any) -> RunConfig:
    task = {key: str(value) if isinstance(value, Path) else value for key, value in task.items()}
    return RunConfig.model_validate({"model": "m", "max_steps": 1, "task": task, **keys})


def refused(call: Callable[[], Any], kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def cells(path: Path | str, column: str = "text", kind: Any = "text") -> list[Any]:
    return [cell for chunk in read_rows(find_files(str(path)), {column: kind}) for cell in chunk.columns[column]]


# ---- reading ----

WRITERS: dict[str, Callable[[Path, Rows], Any]] = {
    "a.jsonl": jsonl,
    "a.ndjson": jsonl,
    "a.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "lines.json": jsonl,
    "a.csv": lambda path, rows: _csv(path, rows, ","),
    "a.tsv": lambda path, rows: _csv(path, rows, "\t"),
    "a.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(
        gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode())
    ),
}


def _csv(path: Path, rows: Rows, delimiter: str) -> None:
    import csv

    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    texts = ["plain", 'quotes " and, commas', "two\nlines", "2020-01-01", "12", "NA", "null", "ünïcode \u2028 \x85"]
    texts += ["tail"] * 3000
    WRITERS[name](tmp_path / name, [{"n": i, "text": text, "label": i % 3} for i, text in enumerate(texts)])
    assert cells(tmp_path / name) == texts
    assert cells(tmp_path / name, "label", "label") == [i % 3 for i in range(len(texts))]


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    jsonl(tmp_path / "2.jsonl", [{"text": "b"}])
    jsonl(tmp_path / "1.jsonl", [{"text": "a"}])
    pq.write_table(pa.table({"text": ["c"]}), tmp_path / "3.parquet")
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "_SUCCESS.json").write_text("{")
    (tmp_path / ".hidden.csv").write_text("x")
    assert cells(tmp_path) == ["a", "b", "c"]
    assert cells(f"file://{tmp_path}") == ["a", "b", "c"]


def test_missing_paths_and_formats(tmp_path: Path) -> None:
    assert "no such file or folder" in refused(lambda: find_files(str(tmp_path / "no.jsonl")))
    (tmp_path / "a.txt").write_text("x")
    assert "found: a.txt" in refused(lambda: find_files(str(tmp_path)))
    assert "found: a.txt" in refused(lambda: find_files(str(tmp_path / "a.txt")))
    assert "cannot be opened" in refused(lambda: find_files("nowhere://x"))


@pytest.mark.parametrize("name", WRITERS)
def test_missing_column_lists_the_columns(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, [{"body": "x", "label": 1}])
    message = refused(lambda: cells(tmp_path / name))
    assert "no column 'text'; there are 'body', 'label'" in message
    assert name in message


def test_a_column_missing_in_a_later_row(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"txt": "y"}])
    message = refused(lambda: cells(tmp_path / "a.jsonl"))
    assert "row 2" in message
    assert "'txt'" in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("position", [0, 1499])
def test_null_cell_is_placed(tmp_path: Path, name: str, position: int) -> None:
    rows: Rows = [{"text": "x"} for _ in range(1500)]
    rows[position] = {"text": None}
    WRITERS[name](tmp_path / name, rows)
    message = refused(lambda: cells(tmp_path / name))
    assert "The cell is null" in message
    assert f"{name}, row {position + 1}, column text" in message


def test_wrong_types_are_placed(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": 1}, {"text": 3, "label": 1.5}])
    assert "The cell is 3 (int); it must be text." in refused(lambda: cells(tmp_path / "a.jsonl"))
    message = refused(lambda: cells(tmp_path / "a.jsonl", "label", "label"))
    assert "1.5 (float); it must be an integer or text" in message
    assert "row 2, column label" in message
    jsonl(tmp_path / "b.jsonl", [{"label": True}])
    assert "True (bool)" in refused(lambda: cells(tmp_path / "b.jsonl", "label", "label"))


def test_an_empty_csv_label_is_null(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,1\ny,\n")
    assert "row 2, column label" in refused(lambda: cells(tmp_path / "a.csv", "label", "label"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', ["not JSON", "line 2"]),
        ("a.jsonl", b'"x"\n', ["not an object", "row 1"]),
        ("a.jsonl", b'{"text": "\xff"}\n', ["cannot be read"]),
        ("a.json", b'[{"text": "x"},\n{]', ["not JSON", "line 2"]),
        ("a.json", b'{\n"text": "x"\n}', ["not JSON", "line 1", "one whole object per line"]),
        ("a.csv", b"text,label\nx,1\ny\n", ["cannot be read", "#3"]),
        ("a.csv", b"text,text\nx,1\n", ["2 columns 'text'"]),
        ("a.csv", b"", ["no column 'text'"]),
        ("a.parquet", b"PAR1 no", ["cannot be read"]),
        ("a.parquet", b"", ["cannot be read"]),
        ("a.jsonl.gz", b"no gzip", ["cannot be read"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:-20], ["cannot be read"]),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    message = refused(lambda: cells(tmp_path / name))
    for word in [*words, name]:
        assert word in message


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": "x"}\n\n{"text": "y"}\n  \n')
    assert cells(tmp_path / "a.jsonl") == ["x", "y"]


# ---- the store ----


def test_store_returns_what_was_written(tmp_path: Path) -> None:
    batches = [TokenBatch([[1, 2], [], [3]], {"label": [7, 8, 9]}), TokenBatch([[4, 5, 6]], {"label": [-1]})]
    store = open_store("f", lambda facts: iter(batches), ("label",))
    assert len(store) == 4
    assert [store.tokens(i).tolist() for i in range(4)] == [[1, 2], [], [3], [4, 5, 6]]
    assert [store.extra("label", i) for i in range(4)] == [7, 8, 9, -1]
    assert (store.facts["tokens"], store.facts["largest_token"]) == (6, 6)
    for index in (-1, 4):
        with pytest.raises(IndexError):
            store.tokens(index)


def test_store_is_a_view_of_the_file(tmp_path: Path) -> None:
    before = pa.total_allocated_bytes()
    store = open_store("f", lambda facts: iter([TokenBatch([list(range(100_000))])]))
    assert not store.tokens(0).flags.owndata
    assert not store.tokens(0).flags.writeable
    assert pa.total_allocated_bytes() - before < 100_000


def test_store_is_made_once_even_by_many_at_a_time(tmp_path: Path) -> None:
    made, gate = [], threading.Barrier(4)

    def rows(facts: dict[str, Any]) -> Any:
        made.append(1)
        yield TokenBatch([[1]])

    def run() -> None:
        gate.wait()
        open_store("f", rows)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert sorted(each.suffix for each in cache_folder().iterdir() if each.suffix != ".lock") == [".arrow"]


def test_failure_leaves_nothing_behind_and_the_next_call_works(tmp_path: Path) -> None:
    def fails(facts: dict[str, Any]) -> Any:
        yield TokenBatch([[1]])
        raise DataError("no")

    with pytest.raises(DataError):
        open_store("f", fails)
    assert [each.suffix for each in cache_folder().iterdir() if each.suffix != ".lock"] == []
    (cache_folder() / "f.123.tmp").write_text("left behind by a killed process")
    assert len(open_store("f", lambda facts: iter([TokenBatch([[1]])]))) == 1
    assert not list(cache_folder().glob("*.tmp"))


@pytest.mark.parametrize("damage", [b"", b"ARROW1", b"x" * 1000])
def test_a_damaged_store_is_made_again(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = open_store("f", lambda facts: iter([TokenBatch([[1, 2]])])).path
    path.unlink()
    path.write_bytes(damage)
    store = open_store("f", lambda facts: iter([TokenBatch([[1, 2]])]))
    assert store.tokens(0).tolist() == [1, 2]
    assert "made again" in caplog.text


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZORAY_CACHE", str(tmp_path / "file"))
    assert "ZORAY_CACHE" in refused(lambda: open_store("f", lambda facts: iter([])))


def test_fingerprint_sees_data_tokenizer_and_keys(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    tokenizer = tiny_tokenizer("gpt2")
    base = fingerprint(find_files(str(path)), tokenizer, {"max_length": 8})
    tokenizer(["x"], truncation=True, max_length=3)
    assert fingerprint(find_files(str(path)), tokenizer, {"max_length": 8}) == base
    assert fingerprint(find_files(str(path)), tiny_tokenizer("gpt2"), {"max_length": 8}) == base
    assert fingerprint(find_files(str(path)), tokenizer, {"max_length": 9}) != base
    assert fingerprint(find_files(str(path)), tiny_tokenizer("bert"), {"max_length": 8}) != base
    tokenizer.add_tokens(["new"])
    assert fingerprint(find_files(str(path)), tokenizer, {"max_length": 8}) != base
    jsonl(path, [{"text": "xy"}])
    assert fingerprint(find_files(str(path)), tiny_tokenizer("gpt2"), {"max_length": 8}) != base


# ---- which examples a probe sees ----


@given(
    seed=st.integers(0, 2**64 - 1),
    n=st.integers(1, 60),
    directions=st.integers(1, 4),
    microbatches=st.integers(1, 3),
    batch_size=st.integers(1, 70),
)
def test_each_epoch_sees_every_example_once(
    seed: int, n: int, directions: int, microbatches: int, batch_size: int
) -> None:
    steps = 2 * n // (directions * microbatches * batch_size) + 2
    shape = {"directions": directions, "microbatches": microbatches, "batch_size": batch_size}
    seen = np.concatenate(
        [
            sample_ids(seed, n, step, direction, microbatch, **shape)
            for step in range(steps)
            for direction in range(directions)
            for microbatch in range(microbatches)
        ]
    )
    assert seen.dtype == np.int64
    assert len(seen) == steps * directions * microbatches * batch_size
    for epoch in range(len(seen) // n):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_and_seeds_differ_and_seed_0_is_a_seed() -> None:
    orders = {tuple(sampler.permutation(seed, 50, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert tuple(range(50)) not in orders


def test_the_order_never_changes() -> None:
    """Ledgers depend on it: these numbers must hold on every machine and in every later version."""
    assert sampler.permutation(0, 8, 0).tolist() == [6, 5, 3, 2, 4, 1, 7, 0]
    assert sample_ids(7, 10, 10**12, 3, 1, directions=4, microbatches=2, batch_size=4).tolist() == [3, 1, 0, 4]


def test_order_does_not_share_bits_with_directions() -> None:
    from zoray.directions import _DOMAIN

    assert sampler._DOMAIN != _DOMAIN


def test_cached_order_cannot_be_spoilt() -> None:
    with pytest.raises(ValueError, match="read-only"):
        sampler.permutation(0, 8, 0)[0] = 1


# ---- causal language modelling ----


def test_packing(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer("gpt2")
    path = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    task = load_task(config({"kind": "causal_lm", "train": path, "max_length": 5}), tokenizer)
    stream = [token for text in TEXTS for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert task.train_size == len(stream) // 5
    batch = task.batch(np.arange(task.train_size))
    assert batch["input_ids"].tolist() == [stream[i : i + 5] for i in range(0, len(stream) - 4, 5)]
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["attention_mask"].min() == 1
    assert {each.dtype for each in batch.values()} == {torch.int64}
    assert task.tokens_per_example == 5
    assert (task.eval_size, task.eval_shards, task.num_labels, task.id2label) == (0, 0, None, None)
    assert task.largest_token == max(stream)


def test_packing_of_much_text_is_the_same_as_of_little(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer("gpt2")
    texts = [TEXTS[i % 5] for i in range(5000)]
    path = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    task = load_task(config({"kind": "causal_lm", "train": path, "max_length": 7}), tokenizer)
    stream = np.array([token for text in texts for token in [*tokenizer(text)["input_ids"], 0]])
    assert task.train_size == len(stream) // 7 > 2048
    assert np.array_equal(
        task.batch(range(task.train_size))["input_ids"].numpy().ravel(), stream[: task.train_size * 7]
    )


def test_packing_keeps_the_tokenizers_beginning_of_text(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a film"}, {"text": "the run"}])
    task = load_task(config({"kind": "causal_lm", "train": path, "max_length": 8}), tiny_tokenizer("llama"))
    ids = task.batch([0])["input_ids"][0].tolist()
    assert (ids[0], ids[3], ids[4], ids[7]) == (3, 0, 3, 0)


def test_too_little_text(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a film"}])
    run = config({"kind": "causal_lm", "train": path, "max_length": 64})
    message = refused(lambda: load_task(run, tiny_tokenizer("gpt2")))
    assert "3 tokens" in message
    assert "task.max_length 64" in message


@pytest.mark.parametrize("extra", [{}, {"prompt_column": "prompt"}])
def test_empty_data_set(tmp_path: Path, tiny_tokenizer: Any, extra: dict[str, str]) -> None:
    path = jsonl(tmp_path / "a.jsonl", [])
    run = config({"kind": "causal_lm", "train": path, **extra})
    assert "empty" in refused(lambda: load_task(run, tiny_tokenizer("gpt2")))


def test_documents_without_an_end_are_warned_about(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    run = config({"kind": "causal_lm", "train": path, "max_length": 4})
    for _ in range(2):  # made, and then read from the cache
        assert "no end-of-text token" in load_task(run, tiny_tokenizer("bert")).warnings[0]


def test_loss_on_the_completion_alone(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer("gpt2")
    path = jsonl(tmp_path / "a.jsonl", [{"p": "the quick brown", "c": "fox jumps"}, {"p": "a", "c": "film"}])
    run = config({"kind": "causal_lm", "train": path, "prompt_column": "p", "text_column": "c", "max_length": 16})
    task = load_task(run, tokenizer)
    batch = task.batch([0, 1])
    assert batch["input_ids"].shape == (2, 8)
    one, two = tokenizer("the quick brown fox jumps")["input_ids"], tokenizer("a film")["input_ids"]
    assert batch["input_ids"][0].tolist() == [*one, 0, 0, 0]
    assert batch["labels"][0].tolist() == [IGNORED_LABEL] * 3 + [*one[3:], 0] + [IGNORED_LABEL] * 2
    assert batch["attention_mask"][0].tolist() == [1] * 6 + [0] * 2
    assert batch["labels"][1].tolist() == [IGNORED_LABEL, two[1], 0] + [IGNORED_LABEL] * 5
    assert task.warnings == []


def test_long_prompts_and_completions_are_cut_and_counted(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer("llama")
    rows = [
        {"p": "the quick brown fox", "c": "jumps over"},
        {"p": "a", "c": "the lazy dog and the quick brown fox"},
        {"p": "a", "c": "film"},
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    run = config({"kind": "causal_lm", "train": path, "prompt_column": "p", "text_column": "c", "max_length": 6})
    task = load_task(run, tokenizer)

    def words(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    batch = task.batch([0, 1, 2])
    assert batch["input_ids"].shape == (3, 6)
    assert batch["input_ids"][0].tolist() == [3, *words("brown fox jumps over"), 0]
    assert batch["input_ids"][1].tolist() == words("the lazy dog and the quick")
    assert batch["labels"][1].tolist() == batch["input_ids"][1].tolist()
    assert "2 of 3 prompts" in task.warnings[0]
    assert "1 of 3 completions" in task.warnings[1]


def test_a_row_with_nothing_to_learn(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"p": "a", "c": "film"}, {"p": "", "c": ""}])
    run = config({"kind": "causal_lm", "train": path, "prompt_column": "p", "text_column": "c"})
    assert "row 2" in refused(lambda: load_task(run, tiny_tokenizer("gpt2")))


@given(data=st.data(), length=st.integers(2, 12))
def test_a_joined_example_fits_and_keeps_its_ends(data: st.DataObject, length: int, tiny_tokenizer: Any) -> None:
    from zoray.tasks.causal_lm import _join

    tokens = st.lists(st.integers(6, 40), max_size=15)
    prompt, completion = data.draw(tokens), data.draw(tokens)
    for tokenizer, head in ((tiny_tokenizer("gpt2"), []), (tiny_tokenizer("llama"), [3])):
        example = _join(head + prompt, completion, tokenizer, length)
        whole = [*completion, 0]
        target = example.tokens[example.loss_start :]
        assert len(example.tokens) <= length
        assert target == whole[:length]
        assert example.completion_cut == (len(whole) > length)
        kept = example.tokens[: example.loss_start]
        assert len(kept) == min(len(head + prompt), length - len(target))
        assert example.prompt_cut == (len(kept) < len(head + prompt))
        if head and kept:
            assert kept[0] == 3
            kept = kept[1:]
        assert kept == prompt[len(prompt) - len(kept) :]


# ---- classification ----


def classification(path: Path, **keys: Any) -> dict[str, Any]:
    return {"kind": "classification", "train": path, "max_length": 16, **keys}


def test_classification_with_numbers(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer("bert")
    path = jsonl(tmp_path / "a.jsonl", [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)])
    task = load_task(config(classification(path)), tokenizer)
    assert (task.kind, task.num_labels, task.id2label, task.train_size) == ("classification", 3, None, 5)
    batch = task.batch([4, 1])
    assert batch["labels"].tolist() == [1, 1]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    expected = tokenizer([TEXTS[4], TEXTS[1]], padding=True, pad_to_multiple_of=8, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert {each.dtype for each in batch.values()} == {torch.int64}


def test_classification_with_names(tmp_path: Path, tiny_tokenizer: Any) -> None:
    train = jsonl(
        tmp_path / "a.jsonl", [{"text": text, "label": name} for text, name in zip(TEXTS, "dcabd", strict=True)]
    )
    held_out = jsonl(tmp_path / "b.jsonl", [{"text": "a film", "label": "d"}])
    task = load_task(config(classification(train, eval=held_out)), tiny_tokenizer("bert"))
    assert task.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}
    assert task.batch(range(5))["labels"].tolist() == [3, 2, 0, 1, 3]
    assert task.eval_batch(0)["labels"].tolist() == [3]


def test_classification_of_csv_with_numbers(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_text("text,label\na film,1\nthe run,0\n")
    task = load_task(config(classification(tmp_path / "a.csv")), tiny_tokenizer("bert"))
    assert task.batch([0, 1])["labels"].tolist() == [1, 0]


def test_pairs(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", [{"text": "a film", "b": "the run", "label": 0}, {"text": "a", "b": "dog", "label": 1}]
    )
    for style in ("bert", "roberta"):
        tokenizer = tiny_tokenizer(style)
        task = load_task(config(classification(path, text_pair_column="b")), tokenizer)
        batch = task.batch([0, 1])
        expected = tokenizer(
            ["a film", "a"], ["the run", "dog"], padding=True, pad_to_multiple_of=8, return_tensors="pt"
        )
        assert set(batch) == {*expected, "labels"}
        for name, tensor in expected.items():
            assert torch.equal(batch[name], tensor), (style, name)


def test_long_texts_are_cut_and_counted_and_the_tokenizer_is_left_alone(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer("bert")
    before = tokenizer.backend_tokenizer.to_str()
    path = jsonl(tmp_path / "a.jsonl", [{"text": "the " * 50, "label": 0}, {"text": "a", "label": 1}])
    task = load_task(config(classification(path)), tokenizer)
    assert task.batch([0])["input_ids"].shape == (1, 16)
    assert "1 of 2 texts were cut to task.max_length 16 tokens" in task.warnings[0]
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize(
    ("labels", "keys", "words"),
    [
        ([0, 5, 1], {"num_labels": 3}, ["The label 5 is not in 0 to 2", "row 2, column label"]),
        ([0, 1, -1], {}, ["The label -1 is not in 0 to 1", "row 3, column label"]),
        ([0, "a"], {}, ["The label is 'a', but earlier ones are like 0", "row 2, column label"]),
        ([1, 1], {}, ["Every row has the label 1"]),
        (["a", "a"], {}, ["Every row has the label 'a'"]),
        (["a", "b", "c"], {"num_labels": 2}, ["num_labels is 2, but there are 3 labels: 'a', 'b', 'c'"]),
        ([0, 10**9], {}, ["would make 1000000001 classes", "row 2"]),
        ([0, None], {}, ["The cell is null", "row 2, column label"]),
        ([], {}, ["empty"]),
    ],
)
def test_labels_that_do_not_fit(
    tmp_path: Path, tiny_tokenizer: Any, labels: list[Any], keys: dict[str, Any], words: list[str]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a film", "label": label} for label in labels])
    message = refused(lambda: load_task(config(classification(path, **keys)), tiny_tokenizer("bert")))
    for word in [*words, "a.jsonl"]:
        assert word in message


@pytest.mark.parametrize(
    ("train", "held_out", "words"),
    [
        ([0, 1], [0, 2], ["The label 2 is not in 0 to 1", "b.jsonl, row 2"]),
        (["a", "b"], ["a", "c"], ["The label 'c' is none of 'a', 'b'", "b.jsonl, row 2"]),
        (["a", "b"], [0], ["The label 0 is none of 'a', 'b'", "b.jsonl, row 1"]),
        ([0, 1], ["a"], ["The label 'a' is not in 0 to 1", "b.jsonl, row 1"]),
        ([0, 1], [], ["empty", "b.jsonl"]),
    ],
)
def test_held_out_labels_that_do_not_fit(
    tmp_path: Path, tiny_tokenizer: Any, train: list[Any], held_out: list[Any], words: list[str]
) -> None:
    a = jsonl(tmp_path / "a.jsonl", [{"text": "a film", "label": label} for label in train])
    b = jsonl(tmp_path / "b.jsonl", [{"text": "a film", "label": label} for label in held_out])
    message = refused(lambda: load_task(config(classification(a, eval=b)), tiny_tokenizer("bert")))
    for word in words:
        assert word in message


def test_classes_that_do_not_occur_are_warned_about(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a film", "label": label} for label in (0, 4)])
    task = load_task(config(classification(path)), tiny_tokenizer("bert"))
    assert task.num_labels == 5
    assert "only 2 of them occur" in task.warnings[0]


def test_text_without_tokens(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 0}, {"text": "", "label": 1}])
    message = refused(lambda: load_task(config(classification(path)), tiny_tokenizer("gpt2")))
    assert "no tokens" in message
    assert "row 2" in message


def test_no_room_for_text(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 0}])
    run = config(classification(path, max_length=2))
    assert "task.max_length 2" in refused(lambda: load_task(run, tiny_tokenizer("bert")), ConfigError)


# ---- batches ----


@pytest.mark.parametrize(
    ("batch_size", "limit", "sizes"), [(2, None, [2, 2, 1]), (2, 3, [2, 1]), (9, None, [5]), (5, 9, [5])]
)
def test_evaluation_is_cut_by_the_configuration_alone(
    tmp_path: Path, tiny_tokenizer: Any, batch_size: int, limit: int | None, sizes: list[int]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)])
    keys = {"per_device_eval_batch_size": batch_size, "max_eval_samples": limit}
    for replicas in (1, 3):
        task = load_task(config(classification(path, eval=path), replicas=replicas, **keys), tiny_tokenizer("bert"))
        assert task.eval_shards == len(sizes)
        assert task.eval_size == sum(sizes)
        labels = [task.eval_batch(i)["labels"].tolist() for i in range(task.eval_shards)]
        assert [len(each) for each in labels] == sizes
        assert [label for each in labels for label in each] == [0, 1, 0, 1, 0][: sum(sizes)]
    for shard in (-1, len(sizes)):
        with pytest.raises(IndexError):
            task.eval_batch(shard)


def test_the_batch_of_a_probe_is_a_function_of_its_address(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS * 3)])
    keys = {"directions": 3, "microbatches": 2, "per_direction_batch_size": 4}
    one, two = (load_task(config(classification(path), replicas=n, **keys), tiny_tokenizer("bert")) for n in (1, 5))
    run = config(classification(path), **keys)
    for address in [(0, 0, 0), (0, 2, 1), (9, 1, 0), (10**9, 2, 1)]:
        a, b = batch_for(one, run, *address), batch_for(two, run, *address)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert len(a["labels"]) == 4
    assert not torch.equal(batch_for(one, run, 0, 0, 0)["input_ids"], batch_for(one, run, 0, 1, 0)["input_ids"])


@pytest.mark.parametrize(("shared", "adaptive"), [(2, {}), (3, {}), (5, {}), (99, {}), (2, {"max_directions": 5})])
def test_neighbouring_directions_share_a_batch(
    shared: int, adaptive: dict[str, int], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """The batches of a step are those of as many directions that have their own: none is skipped, even at the end."""
    path = jsonl(tmp_path / "a.jsonl", [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS * 3)])
    keys = {"microbatches": 2, "per_direction_batch_size": 4}
    directions = 3 if adaptive else 5
    run = config(classification(path), directions=directions, directions_per_batch=shared, optimizer=adaptive, **keys)
    alone = config(classification(path), directions=math.ceil(5 / shared), **keys)
    task = load_task(run, tiny_tokenizer("bert"))
    for step, k, m in itertools.product((0, 1, 7), range(5), range(2)):
        expected = batch_for(task, alone, step, k // shared, m)
        assert torch.equal(batch_for(task, run, step, k, m)["input_ids"], expected["input_ids"])


def test_digest_is_that_of_the_data_not_of_their_place(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows: Rows = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    (tmp_path / "x").mkdir()
    digests = [
        load_task(config(classification(path)), tiny_tokenizer("bert")).digest
        for path in (
            jsonl(tmp_path / "a.jsonl", rows),
            jsonl(tmp_path / "x" / "b.jsonl", rows),
            jsonl(tmp_path / "c.jsonl", rows[::-1]),
            jsonl(tmp_path / "d.jsonl", [{**row, "label": 1 - row["label"]} for row in rows]),
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_changed_data_are_tokenised_again(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a film", "label": i} for i in (0, 1)])
    run = config(classification(path))
    first = load_task(run, tiny_tokenizer("bert"))
    jsonl(path, [{"text": "a film", "label": i} for i in (0, 1, 1)])
    assert (first.train_size, load_task(run, tiny_tokenizer("bert")).train_size) == (2, 3)


def test_two_readers_share_one_file(tmp_path: Path) -> None:
    path = open_store("f", lambda facts: iter([TokenBatch([[1, 2]])])).path
    assert np.array_equal(TokenStore(path).tokens(0), TokenStore(path).tokens(0))
    assert [each for each in path.parent.iterdir() if each.suffix == ".arrow"] == [path]


class Numbers:
    """A task whose batch is the numbers of its examples."""

    train_size = 64

    def batch(self, ids: Any) -> Any:
        return [int(i) for i in ids]


def test_more_directions_in_a_step_do_not_take_the_next_steps_data() -> None:
    run = config(
        {"kind": "causal_lm", "train": "t"},
        directions=2, microbatches=2, per_direction_batch_size=2, optimizer={"max_directions": 8},
    )  # fmt: skip
    numbers: Any = Numbers()
    addresses = [(s, k, m) for s in range(2) for k in range(8) for m in range(2)]
    found = [i for address in addresses for i in batch_for(numbers, run, *address)]
    assert sorted(found) == list(range(64))
