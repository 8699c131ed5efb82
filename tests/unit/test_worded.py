"""Tasks that are put into words: prompts of each data set, which rows are used, candidates, and generated text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import SENTENCES, make_model
from tests.unit.helpers import really_perturbed
from zoray.config import MultipleChoiceTask, PromptedTask, RunConfig
from zoray.config.prompt import expression
from zoray.config.templates import TEMPLATES
from zoray.errors import ConfigError, DataError, ZorayError
from zoray.loss import ModelLoss
from zoray.memory import Resident
from zoray.memory.streamed import Streamed
from zoray.models import load_model, load_tokenizer
from zoray.perturb import Active, Signs
from zoray.replica import Replica
from zoray.tasks import IGNORED_LABEL, batch_for, load_task
from zoray.tasks.candidates import _choices
from zoray.tasks.metrics import exact, f1, words
from zoray.tasks.subset import choose
from zoray.tasks.worded import joined, prompts, word_of

MODEL = Path(__file__).parents[2] / "configs" / "quickstart" / "model"
"""A small GPT-2 with a real byte-level tokenizer."""

SST2 = [
    {"sentence": "a good film with a warm heart ", "label": 1},
    {"sentence": "dull , and then some", "label": 0},
    {"sentence": "it returns the number of bytes written to the file", "label": 1},
    {"sentence": "an error", "label": 0},
    {"sentence": "raise an exception if the argument is not a string", "label": 0},
    {"sentence": "the best way to do it", "label": 1},
]
SQUAD = [
    {
        "title": "Python",
        "context": "The function returns a list of names. " * (1 + i % 2),
        "question": " What does the function return? ",
        "answers": {"text": ["a list of names", "list"], "answer_start": [21, 23]},
    }
    for i in range(5)
]
COPA = [
    {
        "premise": "The file was closed. ",
        "question": question,
        "choice1": "The user saw the error.",
        "choice2": "I read the end of the file.",
        "label": label,
    }
    for question, label in (("cause", 1), ("effect", 0), ("effect", 1))
]


def config(task: dict[str, Any], **keys: Any) -> RunConfig:
    base = {
        "model": str(MODEL),
        "max_steps": 1,
        "learning_rate": 1e-6,
        "optimizer": {"normalize": "none"},
        "per_direction_batch_size": 3,
        "per_device_eval_batch_size": 4,
    }
    return RunConfig.model_validate({**base, **keys, "task": {"max_length": 64, **task}})


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as Parquet, as the hub has them, or as JSONL."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def opened(task: dict[str, Any], final: bool = False, **keys: Any) -> tuple[RunConfig, Any]:
    made = config(task, **keys)
    return made, load_task(made, AutoTokenizer.from_pretrained(MODEL), final=final)


# ---- what each data set becomes ----

PAIR = {"premise": "It rained.", "hypothesis": "It was wet.", "label": 1}
SUPPOSED = 'Suppose It rained. Can we infer that "It was wet."? Yes, No, or Maybe?\n'
BOOLQ = "Rain is water. Is rain wet?"
RECORD = {
    "passage": "Rain fell.\n@highlight\nBob was wet.\n@highlight\nAnn was not.",
    "query": "It was @placeholder who cried.",
    "entities": ["Ann", "Bob"],
    "answers": ["Bob"],
}
RENDERED: dict[str, tuple[dict[str, Any], str, list[str], set[int]]] = {
    "sst2": ({"sentence": "so good ", "label": 1}, "so good It was", [" terrible", " great"], {1}),
    "sst5": (
        {"text": "meh", "label": 2},
        "meh It was",
        [" terrible", " bad", " okay", " good", " great"],
        {2},
    ),
    "trec": (
        {"text": "Who wrote it ?", "coarse_label": 3},
        "Who wrote it ?\nThis question asks for:",
        [" Expression", " Entity", " Description", " Human", " Location", " Number"],
        {3},
    ),
    "mnli": (PAIR, SUPPOSED, ["Yes", "Maybe", "No"], {1}),
    "snli": (PAIR, SUPPOSED, ["Yes", "Maybe", "No"], {1}),
    "cb": (PAIR, SUPPOSED, ["Yes", "No", "Maybe"], {1}),
    "rte": (PAIR, 'It rained.\nDoes this mean that "It was wet." is true? Yes or No?\n', ["Yes", "No"], {1}),
    "boolq": ({"passage": "Rain is water.", "question": "is rain wet", "label": 1}, BOOLQ, [" No", " Yes"], {1}),
    "wsc": (
        {"text": "Bob saw Ann as He fell.", "span1_text": "Bob", "span2_text": "He", "label": 1},
        'Bob saw Ann as He fell.\nIn the previous sentence, does the pronoun "he" refer to Bob? Yes or No?\n',
        ["No", "Yes"],
        {1},
    ),
    "wic": (
        {"word": "bank", "sentence1": "The bank paid.", "sentence2": "A river bank.", "label": 0},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nThe bank paid.\nA river bank.\n',
        ["No", "Yes"],
        {0},
    ),
    "multirc": (
        {"paragraph": "Bob fell.", "question": "Who fell?", "answer": "Ann", "label": 0},
        'Bob fell.\nQuestion: Who fell?\nI found this answer "Ann". Is that correct? Yes or No?\n',
        ["No", "Yes"],
        {0},
    ),
    "copa": (
        COPA[0],
        "The file was closed because",
        [" the user saw the error.", " I read the end of the file."],
        {1},
    ),
    "record": (
        RECORD,
        "Rain fell.\n- Bob was wet.\n- Ann was not.\n-",
        [" It was Ann who cried.", " It was Bob who cried."],
        {1},
    ),
    "squad": (
        SQUAD[0],
        "Title: Python\nContext: The function returns a list of names. \n"
        "Question: What does the function return?\nAnswer:",
        ["a list of names", "list"],
        set(),
    ),
    "drop": (
        {
            "passage": "Bob ran 3 miles.",
            "question": "How far? ",
            "answers_spans": {"spans": ["3"], "types": ["number"]},
        },
        "Passage: Bob ran 3 miles.\nQuestion: How far?\nAnswer:",
        ["3"],
        set(),
    ),
}


ENTAILED = "It rained?[MASK], it was wet."
MASKED = {
    "sst2_mask": (RENDERED["sst2"][0], "so good It was [MASK]."),
    "sst5_mask": (RENDERED["sst5"][0], "meh It was [MASK]."),
    "trec_mask": (RENDERED["trec"][0], "[MASK]: Who wrote it ?"),
    "mnli_mask": (PAIR, ENTAILED),
    "snli_mask": (PAIR, ENTAILED),
    "rte_mask": (PAIR, ENTAILED),
}


def test_every_template_has_a_case() -> None:
    assert RENDERED.keys() | MASKED.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", MASKED)
def test_the_text_around_a_mask(name: str) -> None:
    row, text = MASKED[name]
    task = config({"template": name, "train": "t"}).task
    assert task.architecture == "masked" and task.columns.keys() <= row.keys()
    assert prompts(task, [(row, "here")], "[MASK]") == [text]  # type: ignore[arg-type]
    assert task.label_words == TEMPLATES[name.removesuffix("_mask")]["label_words"]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", RENDERED)
def test_the_text_of_each_data_set(name: str) -> None:
    row, text, answers, right = RENDERED[name]
    task = config({"template": name, "train": "t"}).task
    assert task.columns.keys() <= row.keys()
    [rendered] = prompts(task, [(row, "here")])  # type: ignore[arg-type]
    assert rendered == text
    if isinstance(task, PromptedTask | MultipleChoiceTask):
        found, numbers = (word_of if isinstance(task, PromptedTask) else _choices)(task, row, "here")  # type: ignore[operator]
        assert [joined(text, each)[len(text) :] for each in found] == answers
        assert numbers == right
    else:
        assert expression(task.answers).value(row, "here") == answers  # type: ignore[union-attr]


def test_a_question_that_has_its_mark_gets_no_second_one() -> None:
    task = config({"template": "boolq", "train": "t"}).task
    assert prompts(task, [({"passage": "P.", "question": "why?"}, "")]) == ["P. Why?"]  # type: ignore[arg-type]


def test_cells_are_never_read_as_templates() -> None:
    task = config({"template": "sst2", "train": "t"}).task
    assert prompts(task, [({"sentence": "{7 * 7} {% if %} {{x}}"}, "")]) == ["{7 * 7} {% if %} {{x}} It was"]  # type: ignore[arg-type]


def test_a_task_of_ones_own_words(tmp_path: Path) -> None:
    rows = [{"a": f"text {i}", "kind": kind} for i, kind in enumerate(["x", "y", "x"])]
    task = {"kind": "classification", "prompt": "{a}:", "label_words": {"x": "yes", "y": "no"}, "label_column": "kind"}
    _, found = opened({**task, "train": write(tmp_path / "a.jsonl", rows)})
    assert found.train_size == 3
    assert found.batch([0, 1])["correct"].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("task", "rows", "words"),
    [
        ({"template": "sst2"}, [{"sentence": "x", "label": 7}], ["label '7' has no word", "row 1, column label"]),
        ({"template": "sst2"}, [{"text": "x", "label": 0}], ["no column 'sentence'"]),
        ({"template": "sst2"}, [{"sentence": None, "label": 0}], ["cell is null"]),
        ({"template": "copa"}, [{**COPA[0], "question": "why"}], ["cannot be filled in", "why", "row 1"]),
        ({"template": "copa"}, [{**COPA[0], "label": 2}], ["none of the 2 choices"]),
        ({"template": "record"}, [{**RECORD, "entities": ["Ann"]}], ["not a list of texts"]),
        ({"template": "squad"}, [{**SQUAD[0], "answers": {"text": []}}], ["not a text or a list of texts", "row 1"]),
        ({"template": "squad"}, [{**SQUAD[0], "answers": {"texts": ["a"]}}], ["answers.text", "row 1"]),
        ({"template": "sst2", "k_shot": 2}, SST2[:3], ["only 1 rows with the label 0"]),
        ({"template": "sst2", "dev_samples": 6}, SST2, ["too few"]),
        ({"template": "squad", "max_length": 8, "max_new_tokens": 2, "stop": " end" * 20}, SQUAD, ["Raise task.max"]),
    ],
)
def test_data_that_do_not_fit(tmp_path: Path, task: dict[str, Any], rows: list[Any], words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        opened({**task, "train": write(tmp_path / "t.jsonl", rows)})
    for word in words:
        assert word in str(caught.value)


# ---- which rows are used ----


@given(
    rows=st.integers(1, 60),
    seed=st.integers(0, 2**64 - 1),
    samples=st.none() | st.integers(1, 70),
    dev=st.integers(0, 20),
)
def test_parts_do_not_overlap_and_grow(rows: int, seed: int, samples: int | None, dev: int) -> None:
    if dev >= rows:
        with pytest.raises(DataError):
            choose(rows, seed, "file", samples=samples, dev=dev)
        return
    parts = choose(rows, seed, "file", samples=samples, dev=dev)
    assert list(parts.train) == sorted(set(parts.train)) and list(parts.dev) == sorted(set(parts.dev))
    assert not set(parts.train) & set(parts.dev)
    assert len(parts.dev) == dev
    assert len(parts.train) == min(samples or rows, rows - dev)
    assert parts == choose(rows, seed, "file", samples=samples, dev=dev)
    fewer = choose(rows, seed, "file", samples=max(1, len(parts.train) - 1), dev=dev)
    assert set(fewer.train) <= set(parts.train) and fewer.dev == parts.dev


@given(
    labels=st.lists(st.sampled_from("abc"), min_size=9, max_size=60), seed=st.integers(0, 2**32), k=st.integers(1, 4)
)
def test_shots_of_each_label(labels: list[str], seed: int, k: int) -> None:
    if min(map(labels.count, set(labels))) < k:
        with pytest.raises(DataError, match="only"):
            choose(len(labels), seed, "file", k_shot=k, labels=labels)
        return
    parts = choose(len(labels), seed, "file", k_shot=k, labels=labels)
    chosen = [labels[row] for row in parts.train]
    assert {label: chosen.count(label) for label in set(labels)} == dict.fromkeys(set(labels), k)


def test_the_choice_never_changes() -> None:
    """Ledgers depend on it."""
    assert choose(12, 0, "file", samples=3, dev=2).train == CHOSEN
    assert len({choose(50, seed, "file", samples=10).train for seed in range(5)}) == 5


CHOSEN = (1, 7, 8)


def test_a_run_evaluates_on_rows_it_does_not_train_on(tmp_path: Path) -> None:
    train, test = write(tmp_path / "t.jsonl", SST2), write(tmp_path / "e.parquet", SST2[:3])
    keys = {"template": "sst2", "train": train, "eval": test, "train_samples": 3, "dev_samples": 2}
    _, task = opened(keys)
    assert (task.train_size, task.eval_size) == (3, 2)
    _, final = opened(keys, final=True)
    assert (final.train_size, final.eval_size) == (3, 3)
    assert task.digest == final.digest
    seen = {tuple(row) for row in task.eval_batch(0)["input_ids"].tolist()}
    assert not seen & {tuple(row) for row in task.batch(range(3))["input_ids"].tolist()}
    _, fewer = opened({**keys, "eval_samples": 1}, final=True)
    assert fewer.eval_size == 1
    _, other = opened({**keys, "sample_seed": 1})
    assert other.digest != task.digest


# ---- candidates ----


def likelihoods(model: Any, tokenizer: Any, text: str, answers: list[str]) -> torch.Tensor:
    """Mean log-likelihood of each answer after a text, by transformers alone, a row at a time."""
    found = []
    for answer in answers:
        start = len(tokenizer(text)["input_ids"])
        ids = torch.tensor([tokenizer(text + answer)["input_ids"]])
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].double().log_softmax(-1)
        found.append(logs.gather(1, ids[0, 1:, None])[start - 1 :].mean())
    return torch.stack(found)


@pytest.mark.parametrize("answers", [["terrible", "great"], ["of", "the"]], ids=["tokens", "token"])
@pytest.mark.parametrize(("signs", "head"), [("auto", "auto"), ("sequential", "auto"), ("auto", "full")])
@pytest.mark.parametrize("loss", ["candidates", "answer"])
@pytest.mark.parametrize("objective", ["loss", "accuracy"])
def test_label_words(
    tmp_path: Path, tokenizer: Any, signs: Any, head: Any, loss: str, objective: str, answers: list[str]
) -> None:
    data = write(tmp_path / "t.parquet", SST2)
    words = {"0": answers[0], "1": answers[1]}
    keys = {"template": "sst2", "train": data, "eval": data, "loss": loss, "label_words": words}
    made, task = opened(keys, objective=objective)
    replica = Replica(load_model(made), signs=signs, head=head, objective=task.objective)
    batch = batch_for(task, made, 0, 0, 0)
    one_token = answers == ["of", "the"]
    alone = one_token or (loss == "answer" and objective == "loss")
    assert ("words" in batch) == one_token
    assert len(batch["labels"]) == (3 if alone else 6)
    assert task.tokens_per_example == pytest.approx(
        sum(len(tokenizer(f"{row['sentence'].strip()} It was {answers[1]}")["input_ids"]) for row in SST2)  # type: ignore[attr-defined]
        / 6 * (1 if alone else 2), rel=0.2
    )  # fmt: skip
    verdict = replica.prove(batch)
    assert verdict.batched == (signs == "auto") and verdict.chunked == (head == "auto")
    texts = [f" {answer}" for answer in answers]
    for shift in (0.0, 0.05, -0.05):
        twin = really_perturbed(replica.model, replica, 0, 0, shift)
        costs, right = [], []
        for row in SST2:
            text = f"{str(row['sentence']).strip()} It was"
            found = likelihoods(twin, tokenizer, text, texts)
            label = int(str(row["label"]))
            tokens = len(tokenizer(text + texts[label])["input_ids"]) - len(tokenizer(text)["input_ids"])
            costs.append((float(found.logsumexp(0) - found[label]), -float(found[label]) * tokens, tokens))
            right.append(int(found.argmax()) == label)
        if shift == 0.0:
            loss_sum, _, count, correct, _ = replica.evaluate(task.eval_batch(0)).summary()
            rest = replica.evaluate(task.eval_batch(1)).summary()
            mean = [a if loss == "candidates" else b / n for a, b, n in costs]
            assert (count + rest[2], correct + rest[3]) == (6, sum(right))
            assert loss_sum + rest[0] == pytest.approx(sum(mean), rel=1e-4)
            continue
        probe = replica.probe(0, 0, batch, 0.05)
        value = probe.loss + (1 if shift > 0 else -1) * probe.projected_gradient * 0.05
        chosen = [_found(task, batch, k, alone) for k in range(3)]
        if objective == "accuracy":
            expected = sum(not right[i] for i in chosen) / 3
        elif loss == "candidates":
            expected = sum(costs[i][0] for i in chosen) / 3
        else:
            expected = sum(costs[i][1] for i in chosen) / sum(costs[i][2] for i in chosen)
        assert value == pytest.approx(expected, rel=2e-4, abs=1e-6)


def _found(task: Any, batch: Any, number: int, alone: bool) -> int:
    """Which of the six examples is the batch's `number`th."""
    row = number if alone else 2 * number
    start = int((batch["labels"][row] != IGNORED_LABEL).int().argmax())
    prompt = batch["input_ids"][row, :start].tolist()
    return next(i for i in range(6) if task._train.tokens(2 * i)[: len(prompt)].tolist() == prompt)


FILMS = [{"sentence": f"a {word} film with a {heart} heart", "label": i % 2} for i, (word, heart) in enumerate(
    [("good", "warm"), ("dull", "cold"), ("clever", "warm"), ("silly", "cold"), ("good", "good")]
)]  # fmt: skip


def masked_model(folder: Path) -> str:
    path = make_model("roberta", folder)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(path)
    return str(path)


def test_words_in_the_place_of_a_mask(tmp_path: Path) -> None:
    model, data = masked_model(tmp_path), write(tmp_path / "t.jsonl", FILMS)
    words = {"0": "dull", "1": "good"}
    keys = {"template": "sst2_mask", "train": data, "eval": data, "label_words": words, "max_length": 16}
    made = config(keys, model=model)
    tokenizer = load_tokenizer(made)
    task = load_task(made, tokenizer)
    batch = batch_for(task, made, 0, 0, 0)
    assert (batch["input_ids"] == tokenizer.mask_token_id).sum(1).tolist() == [1, 1, 1]
    replica = Replica(load_model(made), objective=task.objective)
    assert replica.prove(batch).batched and not replica.verdict.shifted  # type: ignore[union-attr]
    tokens = tokenizer.convert_tokens_to_ids(["dull", "good"])
    values = []
    for shift in (0.0, 0.05, -0.05):
        twin, costs = really_perturbed(replica.model, replica, 0, 0, shift), []
        for row in FILMS:
            ids = torch.tensor([tokenizer(f"{row['sentence']} It was [MASK].")["input_ids"]])
            with torch.no_grad():
                logits = twin(ids).logits[0, ids[0] == tokenizer.mask_token_id][0, tokens].double()
            costs.append(float(logits.logsumexp(0) - logits[int(str(row["label"]))]))
        values.append(costs)
    everything = task._collate(task._train, range(5))  # type: ignore[attr-defined]
    assert replica.evaluate(everything).sums.tolist() == pytest.approx(values[0], rel=1e-4)
    probe = replica.probe(0, 0, everything, 0.05)
    assert probe.loss == pytest.approx(sum(values[1] + values[2]) / 10, rel=1e-4)
    gradient = (sum(values[1]) - sum(values[2])) / 5 / 0.1
    assert probe.projected_gradient == pytest.approx(gradient, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("keys", "kind", "words"),
    [
        ({"label_words": {0: "dull film", 1: "good"}}, ConfigError, ["'dull film' is 2 tokens"]),
        ({"prompt": "{mask} or {mask} {sentence}"}, DataError, ["has 2 masks", "row 1"]),
        ({"prompt": "{mask}: {sentence}", "max_length": 4}, DataError, ["has 0 masks", "task.max_length"]),
    ],
)
def test_masks_that_do_not_fit(tmp_path: Path, keys: dict[str, Any], kind: type[ZorayError], words: list[str]) -> None:
    model, data = masked_model(tmp_path), write(tmp_path / "t.jsonl", FILMS)
    task = {"template": "sst2_mask", "train": data, "label_words": {0: "dull", 1: "good"}, "max_length": 16, **keys}
    made = config(task, model=model)
    with pytest.raises(kind) as caught:
        load_task(made, load_tokenizer(made))
    for word in words:
        assert word in str(caught.value)


def test_a_causal_model_has_no_mask(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer has none"):
        opened({"template": "sst2_mask", "train": write(tmp_path / "t.jsonl", FILMS)})


def test_choices_by_length_normalised_likelihood(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "t.jsonl", COPA)
    made, task = opened({"template": "copa", "train": data, "eval": data})
    assert task.objective.loss == "answer" and len(task.batch([0, 1])["labels"]) == 2
    replica = Replica(load_model(made), objective=task.objective)
    batch = task.eval_batch(0)
    replica.prove(batch)
    with torch.no_grad():
        found = task.objective.reduced(ModelLoss(replica.model, shifted=True)(batch), batch)
    for i, word in enumerate(("because", "so", "so")):
        answers = [" the user saw the error.", " I read the end of the file."]
        expected = likelihoods(replica.model, tokenizer, f"The file was closed {word}", answers)
        torch.testing.assert_close(found.outputs[i], expected, rtol=1e-5, atol=1e-5)
    assert task.objective.shown(found, batch)["labels"].tolist() == [1, 0, 1]


def test_examples_with_unequal_numbers_of_choices(tmp_path: Path) -> None:
    rows = [RECORD, {**RECORD, "entities": ["Bob", "Ann", "rain"], "answers": ["Ann", "rain"]}]
    data = write(tmp_path / "t.jsonl", rows)
    made, task = opened({"template": "record", "train": data, "eval": data, "loss": "candidates"})
    batch = task.eval_batch(0)
    assert batch["candidate"].tolist() == [0, 1, 0, 1, 2]
    assert batch["correct"].tolist() == [0, 1, 0, 1, 1]
    replica = Replica(load_model(made), objective=task.objective)
    found = replica.evaluate(batch)
    assert found.counts.tolist() == [1, 0, 1, 0, 0]
    both = replica.evaluate(task._collate(task._train, [1, 0]))
    assert float(both.sums.sum()) == pytest.approx(float(found.sums.sum()), rel=1e-5)


def test_choices_of_one_token_of_which_several_are_right(tmp_path: Path) -> None:
    rows = [{"text": "the end", "choices": ["of", "the", "is"], "right": right} for right in (["of"], ["the", "is"])]
    task = {"kind": "multiple_choice", "prompt": "{text}", "choices": "choices", "answer": "right"}
    for chosen in (rows, rows[:1]):
        data = write(tmp_path / f"{len(chosen)}.jsonl", chosen)
        made, found = opened({**task, "train": data, "eval": data})
        batch = found.eval_batch(0)
        assert ("words" in batch) == (len(chosen) == 1), "a single row would have one right word only"
        replica = Replica(load_model(made), objective=found.objective)
        assert replica.evaluate(batch).summary()[2] == len(chosen)


def test_a_long_prompt_loses_its_beginning(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"sentence": "word " * 100 + "last", "label": 0}, SST2[0]]
    _, task = opened({"template": "sst2", "train": write(tmp_path / "t.jsonl", rows), "max_length": 32})
    batch = task.batch([0])
    assert batch["input_ids"].shape == (2, 32)
    assert tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0] == 1]).endswith("last It was terrible")
    assert any("1 of 2" in text for text in task.warnings)


# ---- generated text ----


@pytest.mark.parametrize(
    ("text", "answers", "score", "same"),
    [
        ("a list of names", ["a list of names", "list"], 1.0, True),
        ("The LIST!", ["list"], 1.0, True),
        ("list of all names", ["list of names"], 6 / 7, False),
        ("names list", ["list names"], 1.0, False),
        ("list list", ["list"], 2 / 3, False),
        ("", ["list"], 0.0, False),
        ("the", ["a"], 0.0, True),
        ("nothing", ["list", "nothing at all"], 1 / 2, False),
    ],
)
def test_f1_and_exact_match(text: str, answers: list[str], score: float, same: bool) -> None:
    assert f1(text, answers) == pytest.approx(score)
    assert exact(text, answers) is same


@given(text=st.text(max_size=30), answers=st.lists(st.text(max_size=30), min_size=1, max_size=3))
def test_f1_is_between_0_and_1_and_symmetric(text: str, answers: list[str]) -> None:
    assert 0.0 <= f1(text, answers) <= 1.0
    assert f1(text, answers[:1]) == f1(answers[0], [text])
    if exact(text, answers) and words(text):
        assert f1(text, answers) == 1.0


def written(model: Any, tokenizer: Any, row: dict[str, Any], count: int, stop: str = "\n") -> str:
    """What a model writes after a row's prompt, by transformers alone: no padding, no cache, a token at a time."""
    text = f"Title: {row['title']}\nContext: {row['context']}\nQuestion: {row['question'].strip()}\nAnswer:"
    ids = tokenizer(text)["input_ids"][-(64 - count) :]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True)).split(stop)[0].strip()


def test_text_is_written_at_the_perturbed_weights(tmp_path: Path, tokenizer: Any) -> None:
    """Each sign by itself, with a cache and padding, is what a model with other weights writes row by row."""
    data = write(tmp_path / "t.parquet", SQUAD)
    made, task = opened({"template": "squad", "train": data, "eval": data, "max_new_tokens": 12}, objective="f1")
    replica = Replica(load_model(made), objective=task.objective)
    batch = batch_for(task, made, 0, 0, 0)
    assert not replica.prove(batch).batched
    epsilon, seen = 0.02, set()
    values = []
    for signs, sign in ((Signs.PLUS, 1), (Signs.MINUS, -1)):
        twin = really_perturbed(replica.model, replica, 3, 1, sign * epsilon)
        expected = [written(twin, tokenizer, row, 12) for row in SQUAD]
        everything = task._collate(task._train, range(5))
        with replica._prober.engine.perturbed(Active(replica.directions, 3, 1, epsilon, signs, 5)), torch.no_grad():
            assert task.objective.write(replica.model, everything) == expected
        seen |= set(expected)
        values.append([f1(text, ["a list of names", "list"]) for text in expected])
    assert len(seen) > 1
    probe = replica.probe(3, 1, batch, epsilon)
    whole = replica.probe(3, 1, task._collate(task._train, range(5)), epsilon)
    assert probe.loss >= 0
    plus, minus = (1 - sum(each) / 5 for each in values)
    assert whole.loss == pytest.approx((plus + minus) / 2)
    assert whole.projected_gradient == pytest.approx((plus - minus) / (2 * epsilon), rel=1e-5, abs=1e-9)


def test_evaluations_measure_what_is_written(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "t.jsonl", SQUAD[:2])
    made, task = opened({"template": "squad", "train": data, "eval": data, "max_new_tokens": 12})
    assert "prompt_ids" not in task.batch([0])
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    texts = [written(model, tokenizer, row, 12, "###") for row in SQUAD[:2]]
    rows = [{**row, "answers": {"text": ["never this", text or "x"]}} for row, text in zip(SQUAD, texts, strict=False)]
    data = write(tmp_path / "u.jsonl", rows)
    made, task = opened({"template": "squad", "train": data, "eval": data, "max_new_tokens": 12, "stop": "###"})
    found = Replica(load_model(made), objective=task.objective).evaluate(task.eval_batch(0))
    assert all(texts) and found.summary()[2:] == (2, 2, 2.0)


def test_the_digest_covers_the_answers(tmp_path: Path) -> None:
    digests = set()
    for last in ("list", "lists"):
        rows = [{**SQUAD[0], "answers": {"text": ["a list", last]}}]
        digests.add(opened({"template": "squad", "train": write(tmp_path / f"{last}.jsonl", rows)})[1].digest)
    assert len(digests) == 2


def test_weights_that_are_streamed_write_the_same(tmp_path: Path) -> None:
    data = write(tmp_path / "t.jsonl", SQUAD)
    keys = {"template": "squad", "train": data, "eval": data, "max_new_tokens": 8, "stop": "###"}
    made, task = opened(keys, objective="f1")
    batch, found = batch_for(task, made, 0, 0, 0), []
    for memory in (Resident, Streamed):
        replica = Replica(load_model(made), objective=task.objective, memory=memory)
        replica.prove(batch)
        found.append((replica.probe(1, 0, batch, 0.01), replica.evaluate(task.eval_batch(0)).summary()))
    assert found[0] == found[1] and found[0][0].projected_gradient != 0


def test_words_in_another_order_are_other_data(tmp_path: Path) -> None:
    """A fingerprint sorts the keys of mappings, and candidates are numbered in their order."""
    data = write(tmp_path / "t.jsonl", SST2)
    words = {"0": "terrible", "1": "great"}
    tasks = [
        opened({"template": "sst2", "train": data, "label_words": each})[1]
        for each in (words, dict(reversed(words.items())))
    ]
    rights = [task.batch([0])["correct"].tolist() for task in tasks]
    assert rights == [[0, 1], [1, 0]] and tasks[0].digest != tasks[1].digest


@pytest.mark.parametrize("kind", ["opt", "llama", "qwen3"])
def test_padding_and_a_cache_change_nothing_that_is_written(tmp_path: Path, kind: str) -> None:
    model = str(make_model(kind, tmp_path))
    rows = [{"text": " ".join(SENTENCES[i].split()[: 2 + 3 * i]), "answer": "the ledger"} for i in range(4)]
    task = {"kind": "generation", "prompt": "{text}", "train": write(tmp_path / "t.jsonl", rows), "stop": "###"}
    made = config({**task, "max_new_tokens": 6, "max_length": 32}, model=model, objective="f1")
    tokenizer = load_tokenizer(made)
    found = load_task(made, tokenizer)
    replica = Replica(load_model(made), objective=found.objective)
    batch = found.batch(range(4))
    assert batch["prompt_mask"][0, 0] == 0 and batch["prompt_mask"][:, -1].tolist() == [1] * 4
    replica.prove(batch)
    seen = set()
    for sign, index in ((1, 0), (-1, 0), (1, 1), (-1, 2)):
        twin = really_perturbed(replica.model, replica, 0, index, sign * 0.05)
        expected = []
        for row in rows:
            ids = tokenizer(row["text"])["input_ids"]
            start = len(ids)
            while len(ids) < start + 6 and ids[-1:] != [tokenizer.eos_token_id]:
                with torch.no_grad():
                    ids.append(int(twin(torch.tensor([ids])).logits[0, -1].argmax()))
            expected.append(tokenizer.decode(ids[start:], skip_special_tokens=True).split("###")[0].strip())
        signs = Signs.PLUS if sign > 0 else Signs.MINUS
        with replica._prober.engine.perturbed(Active(replica.directions, 0, index, 0.05, signs, 4)), torch.no_grad():  # type: ignore[union-attr]
            assert found.objective.write(replica.model, batch) == expected  # type: ignore[attr-defined]
        seen |= set(expected)
    assert len(seen) > 1, "tokens without a word are written as nothing"
