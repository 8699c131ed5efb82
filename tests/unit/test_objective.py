"""Objectives without a gradient: the values that probes minimise, and functions that do not fit."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_model
from tests.unit.helpers import really_perturbed
from tests.unit.run_builder import write_data
from tests.unit.scores import length, margin
from tests.unit.test_worded import COPA, SQUAD, SST2, opened, write
from zoray.config import RunConfig
from zoray.errors import ConfigError, NumericsError, RunError, ZorayError
from zoray.identity import Identity, check_header, identify, ledger_header
from zoray.loss import RowLosses
from zoray.models import load_model, load_tokenizer
from zoray.objective import ACCURACY, Candidates, Objective, load_function
from zoray.proof import Verdict
from zoray.replica import Replica
from zoray.tasks import batch_for, load_task

EPSILON = 0.05


def replica_of(config: RunConfig, task: Any, **keys: Any) -> Replica:
    return Replica(load_model(config, num_labels=task.num_labels), signs=config.signs, objective=task.objective, **keys)


def both(replica: Replica, batch: Any, epsilon: float = EPSILON) -> tuple[float, float]:
    """The two values of the probe of direction (0, 0)."""
    probe = replica.probe(0, 0, batch, epsilon)
    half = probe.projected_gradient * epsilon
    return probe.loss + half, probe.loss - half


@pytest.mark.parametrize("objective", ["accuracy", "tests.unit.scores:margin"])
def test_a_classifier_with_a_head(tmp_path: Path, objective: str) -> None:
    model = make_model("bert", tmp_path, head="classification")
    task = {"kind": "classification", **write_data(tmp_path, "classification"), "max_length": 16}
    keys = {"model": str(model), "max_steps": 1, "task": task}
    keys |= {"learning_rate": 1e-6, "optimizer": {"normalize": "none"}}
    config = RunConfig.model_validate({**keys, "objective": objective})
    found = load_task(config, load_tokenizer(config))
    replica, batch = replica_of(config, found), batch_for(found, config, 0, 0, 0)
    assert replica.prove(batch).batched == (objective == "accuracy")
    for value, sign in zip(both(replica, batch), (1, -1), strict=True):
        with torch.no_grad():
            logits = really_perturbed(replica.model, replica, 0, 0, sign * EPSILON)(
                **{name: tensor for name, tensor in batch.items() if name != "labels"}
            ).logits
        if objective == "accuracy":
            assert value == pytest.approx(float((logits.argmax(1) != batch["labels"]).double().mean()), abs=1e-6)
        else:
            assert value == pytest.approx(-float(margin(logits, batch).double().mean()), rel=1e-3, abs=1e-5)
    evaluated = replica.evaluate(found.eval_batch(0)).summary()
    assert evaluated[0] > 0 and evaluated[2] == found.eval_size
    assert (evaluated[4] != 0) == (objective != "accuracy")


def test_a_function_of_candidates(tmp_path: Path) -> None:
    data = write(tmp_path / "t.jsonl", COPA)
    config, task = opened({"template": "copa", "train": data, "eval": data}, objective="tests.unit.scores:margin")
    replica, batch = replica_of(config, task), batch_for(task, config, 0, 0, 0)
    assert len(batch["labels"]) == 6, "a score needs all candidates, also where the loss does not"
    replica.prove(batch)
    for value, sign in zip(both(replica, batch), (1, -1), strict=True):
        twin = Replica(really_perturbed(replica.model, replica, 0, 0, sign * EPSILON), objective=task.objective)
        twin.prove(batch)
        scores = twin.evaluate(batch).scores
        assert scores is not None and value == pytest.approx(-float(scores.mean()), rel=1e-3)


def test_a_function_of_a_language_models_logits(tmp_path: Path) -> None:
    model = make_model("gpt2", tmp_path)
    task = {"kind": "causal_lm", **write_data(tmp_path, "causal_lm"), "max_length": 8}
    keys = {"model": str(model), "max_steps": 1, "task": task, "objective": "tests.unit.scores:last_logit"}
    keys |= {"learning_rate": 1e-6, "optimizer": {"normalize": "none"}}
    config = RunConfig.model_validate(keys)
    found = load_task(config, load_tokenizer(config))
    replica, batch = replica_of(config, found), batch_for(found, config, 0, 0, 0)
    verdict = replica.prove(batch)
    assert not verdict.chunked and not verdict.batched
    plus, _ = both(replica, batch)
    with torch.no_grad():
        logits = really_perturbed(replica.model, replica, 0, 0, EPSILON)(batch["input_ids"]).logits[:, -1]
    assert plus == pytest.approx(-float(logits.gather(1, batch["input_ids"][:, -1:]).mean()), rel=1e-3, abs=1e-4)
    assert replica.evaluate(found.eval_batch(0)).outputs is None


def test_a_function_of_generated_text(tmp_path: Path) -> None:
    data = write(tmp_path / "t.jsonl", SQUAD)
    task = {"template": "squad", "train": data, "eval": data, "max_new_tokens": 8, "stop": "###"}
    config, found = opened(task, objective="tests.unit.scores:length")
    replica, batch = replica_of(config, found), batch_for(found, config, 0, 0, 0)
    replica.prove(batch)
    for value, sign in zip(both(replica, batch, 0.01), (1, -1), strict=True):
        twin = really_perturbed(replica.model, replica, 0, 0, sign * 0.01)
        with torch.no_grad():
            texts = found.objective.write(twin, batch)
        assert value == pytest.approx(-sum(length(texts, batch)) / 3, abs=1e-4) and any(texts)
    assert replica.evaluate(found.eval_batch(0)).summary()[4] == sum(
        length(found.objective.write(replica.model, found.eval_batch(0)), {"references": [0] * 4})
    )


def test_a_probe_is_the_same_whoever_runs_it(tmp_path: Path) -> None:
    data = write(tmp_path / "t.jsonl", SQUAD)
    config, task = opened({"template": "squad", "train": data, "max_new_tokens": 8}, objective="f1")
    first, second = replica_of(config, task), replica_of(config, task)
    batches = [batch_for(task, config, step, 0, 0) for step in range(3)]
    for replica in (first, second):
        replica.prove(batches[0])
    there = [first.probe(step, 0, batches[step], EPSILON) for step in (0, 1, 2)]
    back = [second.probe(step, 0, batches[step], EPSILON) for step in (2, 0, 1)]
    assert there == [back[1], back[2], back[0]]


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("nowhere.at_all:f", ConfigError, ["cannot be imported", "nowhere", "PYTHONPATH"]),
        ("tests.unit.scores:nothing", ConfigError, ["cannot be imported", "nothing"]),
        ("tests.unit.scores:not_a_function", ConfigError, ["is int, not a function"]),
        ("sys:intern", ConfigError, ["no source"]),
        ("tests.unit.scores:one_number", ConfigError, ["shape ()", "3 examples"]),
        ("tests.unit.scores:no_number", NumericsError, ["returns nan"]),
        ("tests.unit.scores:fails", ConfigError, ["fails: KeyError", "gold"]),
    ],
)
def test_functions_that_do_not_fit(tmp_path: Path, name: str, kind: type[ZorayError], words: list[str]) -> None:
    with pytest.raises(kind) as caught:
        config, task = opened({"template": "sst2", "train": write(tmp_path / "t.jsonl", SST2)}, objective=name)
        replica_of(config, task).prove(batch_for(task, config, 0, 0, 0))
    assert caught.value.where == "objective"
    for word in words:
        assert word in str(caught.value)


def test_a_function_with_another_source_is_another_objective(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for body in ("return [1.0] * len(outputs)", "return [2.0] * len(outputs)"):
        (tmp_path / "mine.py").write_text(f"def score(outputs, batch):\n    {body}\n")
        sys.modules.pop("mine", None)
        found.append(load_function("mine:score").identity)
    assert found[0] != found[1] and all(each.startswith("mine:score ") for each in found)
    mine, theirs = (
        Identity("1", "c", "c", "b", "l", "d", Verdict(True, True), objective=objective) for objective in found
    )
    with pytest.raises(RunError, match="another objective"):
        mine.check(theirs, "replica 3")
    mine.check(replace(theirs, objective=found[0]), "replica 3")


def test_a_function_that_is_imported_is_known_by_where_it_is_defined(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "front.py").write_text("from behind import score\n")
    found = []
    for body in ("return [1.0] * len(outputs)", "return [2.0] * len(outputs)"):
        (tmp_path / "behind.py").write_text(f"def score(outputs, batch):\n    {body}\n")
        sys.modules.pop("front", None), sys.modules.pop("behind", None)
        found.append(load_function("front:score").identity)
    assert found[0] != found[1]


def test_a_run_is_not_continued_with_another_objective(tmp_path: Path) -> None:
    data = write(tmp_path / "t.jsonl", SST2)
    config, task = opened({"template": "sst2", "train": data})
    replica, batch = replica_of(config, task), batch_for(task, config, 0, 0, 0)
    replica.prove(batch)
    identity = identify(replica, task.digest, config)
    header = ledger_header(config, identity, task)
    check_header(header, identity, config, "ledger")
    with pytest.raises(ZorayError, match="another objective"):
        check_header(header, replace(identity, objective="accuracy"), config, "ledger")
    del header["identity"]["objective"]
    check_header(header, identity, config, "a ledger from before there were any")


def test_the_reduction_of_candidates_by_hand() -> None:
    losses = RowLosses(torch.tensor([2.0, 6.0, 1.0, 1.0, 9.0]).double(), torch.tensor([1, 2, 1, 1, 3]))
    batch = {"candidate": torch.tensor([0, 1, 0, 1, 2]), "correct": torch.tensor([1, 0, 0, 1, 1])}
    batch["labels"] = torch.zeros(5, 1, dtype=torch.int64)
    found = Candidates("candidates").reduced(losses, batch)
    first, second = (torch.tensor(row).double().log_softmax(0) for row in ([-2.0, -3.0], [-1.0, -1.0, -3.0]))
    assert found.sums.tolist() == pytest.approx([-float(first[0]), 0, -float(second[1]), 0, 0])
    assert found.counts.tolist() == [1, 0, 1, 0, 0]
    # A tie goes to the first, which is wrong here.
    assert found.correct is not None and found.correct.tolist() == [True, False, False, False, False]
    answer = Candidates("answer").reduced(losses, batch)
    assert answer.sums.tolist() == [2, 0, 1, 0, 0] and answer.counts.tolist() == [1, 0, 1, 0, 0]
    wrong = Candidates("candidates", ACCURACY).probe(torch.nn.Identity(), batch, lambda: losses)
    assert wrong.mean() == 0.5 and wrong.summary()[2] == 2


def test_identities() -> None:
    assert Objective().identity == "loss" and Objective(ACCURACY).identity == "accuracy"
    assert not Objective(ACCURACY).separate and not Objective(ACCURACY).whole
