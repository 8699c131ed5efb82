"""The configuration: what is accepted, what is refused and with which words, and what counts as mathematics."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from zoray.config import (
    DIFFERENTIATING,
    EstimatorName,
    RunConfig,
    TrainableLora,
    changed,
    dump,
    load,
    mathematics,
    schedule_needs_max_steps,
    with_memory,
)
from zoray.config.docs import markdown
from zoray.config.sections import (
    DirectionConfig,
    ReplicaRange,
    ResidentMemory,
    StreamedMemory,
    Zero3Memory,
)
from zoray.config.tasks import CausalLMTask, ClassificationTask
from zoray.config.trainable import BlocksConfig, LoraConfig, PrefixConfig, SparseConfig
from zoray.config.worded import GenerationTask, MultipleChoiceTask, PromptedTask
from zoray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

MINIMAL = """\
model: some/model
max_steps: 10
task:
  kind: causal_lm
  train: data.jsonl
"""


def config(**keys: Any) -> RunConfig:
    base: dict[str, Any] = {"model": "m", "max_steps": 10, "task": {"kind": "causal_lm", "train": "t", "eval": "e"}}
    return RunConfig.model_validate({**base, **keys})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_defaults_are_those_of_the_design(file: Path) -> None:
    run = load(file)
    assert (run.directions, run.microbatches, run.epsilon) == (16, 1, 1e-3)
    assert (run.optimizer.normalize, run.learning_rate, run.lr_scheduler_type) == ("curvature", 0.1, "linear")
    assert (run.direction.kind, run.direction.rank, run.memory.kind, run.trainable) == ("inputs", 1, "resident", "full")
    assert isinstance(run.task, CausalLMTask)
    assert run.task.text_column == "text"


def test_trackers_go_by_their_names(file: Path) -> None:
    assert load(file).report_to == "none"
    assert load(file, ["report_to=tensorboard"]).report_to == "tensorboard"
    assert load(file, ["report_to=[wandb, mlflow]"]).report_to == ["wandb", "mlflow"]
    assert "Did you mean tensorboard?" in refused(file, "report_to=tensorbord")
    assert "Did you mean wandb?" in refused(file, "report_to=[mlflow, wandb_]")
    assert "report_to" in refused(file, "report_to=3")
    assert "Did you mean report_to?" in refused(file, "report_too=wandb")
    assert changed(config(), config(report_to="all")) == []


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "0.000001", ".1e-5"])
def test_floats_without_a_point_are_floats(file: Path, text: str) -> None:
    file.write_text(MINIMAL + f"learning_rate: {text}\n")
    assert load(file).learning_rate == 1e-6
    assert load(file, [f"epsilon={text}"]).epsilon == 1e-6


def test_overrides_win_and_reach_inside_sections(file: Path) -> None:
    run = load(
        file,
        ["task.max_length=64", "directions=4", "trainable={lora: {r: 2}}", "trainable.lora.bias=all", "eval_steps="],
    )
    assert isinstance(run.trainable, TrainableLora)
    assert (run.task.max_length, run.directions, run.trainable.lora.r, run.trainable.lora.bias) == (64, 4, 2, "all")
    assert run.eval_steps is None


def test_override_may_make_a_section(file: Path) -> None:
    assert load(file, ["direction.rank=3"]).direction == DirectionConfig(rank=3)


@pytest.mark.parametrize("text", ["directions", "=3", "task..train=x", ""])
def test_malformed_override(file: Path, text: str) -> None:
    message = refused(file, text)
    assert "not an override" in message
    assert "command line" in message


def test_override_inside_a_value(file: Path) -> None:
    message = refused(file, "model.name=x")
    assert "'some/model' and has no keys" in message
    assert "line 1" in message


def test_override_that_is_not_yaml(file: Path) -> None:
    assert "not YAML" in refused(file, "trainable={lora")


def test_fault_of_an_override_is_placed_on_the_command_line(file: Path) -> None:
    assert "the command line, task={kind: causal_lm, train: 3}" in refused(file, "task={kind: causal_lm, train: 3}")


@pytest.mark.parametrize(
    ("line", "wrong", "right"),
    [
        ("learning_rat: 1", "learning_rat", "learning_rate"),
        ("lr: 1", "lr", "learning_rate"),
        ("max_length: 64", "max_length", "task.max_length"),
        ("rank: 2", "rank", "direction.rank"),
        ("direction: {knd: rank}", "direction.knd", "direction.kind"),
        ("trainable: {lora: {alpha: 2}}", "trainable.lora.alpha", "trainable.lora.lora_alpha"),
        ("trainable: {lara: {}}", "trainable.lara", "trainable.lora"),
        ("trainable: {prefix: {num_tokens: 2}}", "trainable.prefix.num_tokens", "trainable.prefix.num_virtual_tokens"),
        ("trainable: {sparse: {spars: 0.5}}", "trainable.sparse.spars", "trainable.sparse.sparsity"),
        ("trainable: {blocks: {count: 2, step: 3}}", "trainable.blocks.step", "trainable.blocks.steps"),
        ("trainable: {block: {}}", "trainable.block", "trainable.blocks"),
        ("direction: {seed: 1}", "direction.seed", "seed"),
    ],
)
def test_unknown_key_names_the_line_and_the_near_one(file: Path, line: str, wrong: str, right: str) -> None:
    file.write_text(MINIMAL + line + "\n")
    message = refused(file)
    assert f"There is no key {wrong}." in message
    assert f"Did you mean {right}?" in message
    assert f"{file}, line 6" in message


def test_unknown_key_of_a_task(file: Path) -> None:
    file.write_text(MINIMAL + "  text_colum: body\n")
    message = refused(file)
    assert "There is no key task.text_colum." in message
    assert "Did you mean task.text_column?" in message
    assert "line 6" in message


def test_unknown_key_like_no_other_lists_the_keys(file: Path) -> None:
    assert "The keys here are kind, rank." in refused(file, "direction={xyzzy: 1}")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("directions=four", ["directions is 'four'", "valid integer", "This is text"]),
        ("directions=true", ["directions is True", "valid integer"]),
        ("directions=2.0", ["valid integer", "Write 2."]),
        ("directions=0", ["directions is 0", "greater than or equal to 1"]),
        ("seed=-1", ["seed is -1"]),
        ("learning_rate=.nan", ["learning_rate is nan", "finite"]),
        ("epsilon=0", ["epsilon is 0", "greater than 0"]),
        ("model=7", ["model is 7", "in quotes"]),
        ("trust_remote_code=1", ["trust_remote_code is 1", "valid boolean"]),
        ("dtype=bf16", ["dtype is 'bf16'", "Did you mean bfloat16?"]),
        ("lr_scheduler_type=cosin", ["lr_scheduler_type is 'cosin'", "Did you mean cosine?"]),
        ("task.kind=causal", ["task.kind is 'causal'", "Did you mean causal_lm?"]),
        ("task={train: x}", ["task.kind is missing", "'causal_lm', 'classification'"]),
        ("memory={shards: 2}", ["memory.kind is missing", "'resident', 'zero3', 'streamed'"]),
        ("memory={kind: zero, shards: 2}", ["memory.kind is 'zero'", "Did you mean zero3?"]),
        ("memory={kind: zero3, shards: 2, offlod: cpu}", ["no key memory.offlod", "Did you mean memory.offload?"]),
        ("memory={kind: zero3}", ["memory.shards is missing"]),
        ("memory={kind: streamed, offload: nvme, nvme_path: fast}", ["relative path", "begins with /"]),
        ("optimizer={momentum: 1.0}", ["optimizer.momentum"]),
        ("optimizer={momentun: 0.9}", ["Did you mean optimizer.momentum?"]),
        ("optimizer={nesterov: true}", ["no momentum", "Give optimizer.momentum"]),
        ("optimizer={momentum_window: 3}", ["window without momentum"]),
        ("optimizer={shaping: rank, normalize: second_moment}", ["no scale", "optimizer.shaping out"]),
        ("optimizer={max_directions: 8}", ["From 16 to 8 directions"]),
        ("optimizer={momentum: 0.999}", ["reaches back 2995 steps", "Set optimizer.momentum_window to 255"]),
        ("estimator=one-sided", ["estimator is 'one-sided'", "Did you mean one_sided?"]),
        ("split_signs=true", ["signs is auto", "Set signs to sequential"]),
        ("memory={kind: zero3, shards: 1, offload: nvme}", ["need a folder", "Give nvme_path"]),
        ("memory={kind: zero3, shards: 1, nvme_path: /fast}", ["but no files", "Give nvme_path"]),
        ("memory={kind: stream}", ["memory.kind is 'stream'", "Did you mean streamed?"]),
        ("memory={kind: streamed, shards: 2}", ["no key memory.shards"]),
        ("memory={kind: streamed, offload: none}", ["memory.offload is 'none'", "'cpu' or 'nvme'"]),
        ("memory={kind: streamed, offload: nvme}", ["need a folder", "Give nvme_path"]),
        ("memory={kind: streamed, nvme_path: /fast}", ["but no files", "Give nvme_path"]),
        ("task=x", ["task is 'x'"]),
        ("task={kind: causal_lm}", ["task.train is missing"]),
        ("trainable=(", ["not a regular expression", "trainable"]),
        ("trainable=lora", ["{lora: {r: 8}}"]),
        ("trainable=sparse", ["sparse: {sparsity: 0.75}"]),
        ("trainable={sparse: {sparsity: 1}}", ["trainable.sparse.sparsity is 1"]),
        ("trainable={sparse: {parameters: '('}}", ["not a regular expression"]),
        ("trainable={blocks: {}}", ["trainable.blocks.count is missing"]),
        ("trainable={blocks: {count: 1}}", ["trainable.blocks.count is 1"]),
        ("trainable={lora: {}, sparse: {}}", ["There is no key trainable.sparse"]),
        ("trainable=3", ["trainable is 3"]),
        ("trainable={lora: {target_modules: 3}}", ["trainable.lora.target_modules is 3"]),
        ("run_name=a/b", ["run_name is 'a/b'", "pattern"]),
        ("metrics_port=70000", ["metrics_port is 70000"]),
        ("memory.kind=paged", ["memory.kind is 'paged'", "resident"]),
    ],
)
def test_wrong_values(file: Path, override: str, words: list[str]) -> None:
    message = refused(file, override)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task={template: sst3, train: x}"], ["no template 'sst3'", "Did you mean sst"]),
        (["task={template: squad, kind: classification, train: x}"], ["task.kind is 'classification'", "generation"]),
        (["task={template: sst2, train: x, promt: y}"], ["no key task.promt", "Did you mean task.prompt?"]),
        (["task={template: sst2, train: x, prompt: '{a'}"], ["task.prompt is '{a'", "is no template"]),
        (["task={template: squad, train: x, answers: 'a b'}"], ["task.answers is 'a b'", "is no expression"]),
        (["task={template: squad, train: x, max_new_tokens: 600}"], ["max_new_tokens (600)", "Raise task.max_length"]),
        (["task={template: sst2, train: x, k_shot: 2, train_samples: 3}"], ["both given", "Give one of them"]),
        (["task={template: sst2, train: x, label_words: {0: a, 1: a}}"], ["the same word"]),
        (["task={template: sst2, train: x, label_words: {0: a}}"], ["task.label_words", "at least 2"]),
        (["objective=accuracy"], ["no accuracy of task.kind causal_lm"]),
        (["objective=f1"], ["f1 compares generated text", "task.kind generation"]),
        (["objective=bleu"], ["objective is 'bleu'", "pattern"]),
        (["objective=a:b", "head=chunked"], ["head is chunked"]),
        (["objective=a:b", "signs=batched"], ["signs is batched"]),
        (["task={template: squad, train: x}", "objective=f1", "signs=batched"], ["signs is batched", "sequential"]),
        (
            ["task={template: squad, train: x}", "objective=f1", "memory={kind: zero3, shards: 2}"],
            ["any", "kind: streamed"],
        ),
        (["task={template: squad, train: x, eval: y}", "memory={kind: zero3, shards: 2}"], ["generated text has any"]),
    ],
)
def test_words_and_objectives_that_do_not_fit(file: Path, overrides: list[str], words: list[str]) -> None:
    message = refused(file, *overrides)
    for word in words:
        assert word in message


def test_a_template_fills_in_what_is_not_given(file: Path) -> None:
    run = load(file, ["task={template: sst2, train: x, prompt: 'Is {sentence} good?'}"])
    assert isinstance(run.task, PromptedTask)
    assert run.task.prompt == "Is {sentence} good?" and run.task.label_words == {"0": "terrible", "1": "great"}
    squad = ["task={template: squad, train: x}", "objective=f1", "optimizer.normalize=none", "learning_rate=1"]
    assert run.differentiable and not load(file, squad).differentiable
    again = file.with_name("again.yaml")
    again.write_text(dump(run))
    assert load(again) == run


def test_the_task_of_the_design(file: Path) -> None:
    run = load(
        file, ['task={kind: classification, train: t, prompt: "{sentence} It was", label_words: {0: a, true: b}}']
    )
    assert isinstance(run.task, PromptedTask)
    assert run.task.label_words == {"0": "a", "true": "b"} and list(run.task.columns) == ["sentence", "label"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lr_scheduler_type=linear", "warmup_steps=1", "warmup_ratio=0.1"], ["both given", "warmup_ratio=0.1"]),
        (["lr_scheduler_type=constant", "warmup_steps=1"], ["no warm-up", "constant_with_warmup"]),
        (["eval_steps=5"], ["task.eval is not"]),
        (["direction={kind: gaussian, rank: 2}"], ["gaussian has no rank"]),
        (["task.prompt_column=text"], ["both column 'text'"]),
        (["task={kind: classification, train: t, label_column: text}"], ["'text' is given two parts"]),
        (["directions=132105"], ["not below 2**24", "at most 132104"]),
        (["directions=66053", "direction.rank=2"], ["not below 2**24", "at most 66052"]),
        (["lr_scheduler_type=polynomial", "learning_rate=1e-7"], ["ends at 1e-07", "linear"]),
        (["learning_rate=1", "weight_decay=1"], ["not positive"]),
        (["directions=1", "optimizer={shaping: rank, normalize: none}"], ["there is one", "second_moment"]),
        (["directions=1", "optimizer={shaping: centered}"], ["there is one", "second_moment"]),
        (
            ["trainable={blocks: {count: 2}}", "optimizer={normalize: curvature}"],
            ["a curvature each", "train without turns"],
        ),
        (["objective=a.b:c"], ["the objective is a.b:c", "second_moment"]),
        (["optimizer.normalize=none"], ["best learning rate", "none is given", "zoray tune"]),
        (
            ["optimizer={max_directions: 64}", "per_direction_batch_size=1"],
            ["one of 1 rows", "Set microbatches to 2 or more"],
        ),
        (
            ["optimizer={normalize: none, max_directions: 64}", "estimator=backprop", "learning_rate=1"],
            ["one of 4 rows, with estimator backprop", "Set microbatches to 2 or more"],
        ),
        (["estimator=backprop"], ["estimator backprop has none", "second_moment"]),
        (["estimator=one_sided"], ["directions_per_batch is 1", "Set directions_per_batch to 2 or more"]),
        (["estimator=one_sided", "directions_per_batch=2", "signs=batched"], ["signs is batched", "Leave signs out"]),
        (["estimator=forward_gradient", "signs=batched"], ["no two signs", "signs is batched"]),
        (
            ["estimator=one_sided", "directions_per_batch=2", "signs=sequential", "split_signs=true"],
            ["one by one anyway", "Leave split_signs out"],
        ),
        (["estimator=backprop", "signs=sequential", "split_signs=true"], ["no two signs", "Leave split_signs out"]),
        (["estimator=backprop", "head=chunked"], ["head in one piece", "Leave head out"]),
        (["estimator=backprop", "memory={kind: streamed}"], ["all in one place", "memory.kind is streamed"]),
        (["estimator=forward_gradient", "memory={kind: zero3, shards: 2}"], ["memory.kind is zero3", "one_sided"]),
        (["trainable={prefix: {}}", "memory={kind: zero3, shards: 2}"], ["trainable", "real tokens", "lora"]),
    ],
)
def test_contradictions(file: Path, overrides: list[str], words: list[str]) -> None:
    message = refused(file, *overrides)
    for word in words:
        assert word in message


@pytest.mark.parametrize("estimator", get_args(EstimatorName))
def test_estimators_and_what_goes_with_them(file: Path, estimator: str) -> None:
    keys = [
        f"estimator={estimator}",
        "directions_per_batch=16",
        "optimizer.normalize=none",
        "learning_rate=1",
        "signs=sequential",
        "head=full",
    ]
    config = load(file, keys)
    assert config.proved_signs == "sequential" and mathematics(config)["estimator"] == estimator
    assert load(file, keys[:4]).proved_signs == ("auto" if estimator == "spsa" else "sequential")
    differentiating = estimator in DIFFERENTIATING
    for memory in ("{kind: streamed}", "{kind: zero3, shards: 2}"):
        if differentiating:
            with pytest.raises(ConfigError, match="--memory"):
                with_memory(config, memory)
        else:
            assert with_memory(config, memory).estimator == estimator
    assert with_memory(config, "{kind: resident}") == config


def test_the_largest_exact_sum_is_accepted(file: Path) -> None:
    assert load(file, ["directions=132104"]).directions == 132104
    assert load(file, ["directions=132105", "direction.kind=gaussian"]).directions == 132105


def test_all_faults_are_told_at_once(file: Path) -> None:
    file.write_text(MINIMAL + "lr: 1\nseed: x\n")
    message = refused(file)
    assert "2 faults" in message
    assert "line 6" in message
    assert "line 7" in message


def test_missing_keys(file: Path) -> None:
    file.write_text("model: m\n")
    message = refused(file)
    assert "The key task is missing." in message
    assert "The key max_steps is missing." in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["not a mapping"]),
        ("- a\n- b\n", ["not a mapping"]),
        ("a: [1\nb: 2\n", ["not YAML", "line 2"]),
        ("model: a\nseed: 1\nseed: 2\n", ["The key seed is given twice.", "lines 2 and 3"]),
        ("task:\n  kind: a\n  kind: b\n", ["task.kind is given twice"]),
        ("model: !!python/object:os.system x\n", ["not YAML", "line 1"]),
    ],
)
def test_files_that_are_no_configuration(file: Path, text: str, words: list[str]) -> None:
    file.write_text(text)
    message = refused(file)
    for word in [*words, str(file)]:
        assert word in message


def test_missing_file_and_folder_and_bytes(tmp_path: Path) -> None:
    assert "There is no configuration file" in refused(tmp_path / "no.yaml")
    assert "cannot be read" in refused(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused(tmp_path / "b.yaml")


def test_paths_are_taken_from_the_file_then_from_the_working_directory(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert load(file).task.train == "data.jsonl"
    (here / "data.jsonl").touch()
    assert load(file).task.train == str(here / "data.jsonl")
    (tmp_path / "data.jsonl").touch()
    assert load(file).task.train == str(tmp_path / "data.jsonl")
    assert load(file, ["task.train=data.jsonl"]).task.train == str(here / "data.jsonl")
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert load(file).model == str(tmp_path / "some" / "model")
    assert load(file, ["model=gpt2"]).model == "gpt2"


def test_a_link_keeps_its_name(file: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").touch()
    (tmp_path / "data.jsonl").symlink_to(tmp_path / "blob")
    assert load(file).task.train == str(tmp_path / "data.jsonl")


@given(
    run_name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]*", fullmatch=True)
    | st.sampled_from(["1e6", "1e-6", "yes", "null", "12"]),
    column=st.text(min_size=1),
    rate=st.floats(0, 1e3, allow_nan=False),
    lora=st.none() | st.integers(1, 100),
    seed=st.integers(0, 2**63 - 1),
)
def test_dump_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, run_name: str, column: str, rate: float, lora: int | None, seed: int
) -> None:
    trainable: Any = "full" if lora is None else {"lora": {"r": lora, "target_modules": ["q", "1e3"]}}
    task = {"kind": "classification", "train": "t", "text_column": column}
    run = config(run_name=run_name, learning_rate=rate, trainable=trainable, seed=seed, task=task)
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump(run), encoding="utf-8")
    assert load(path) == run


def test_configuration_cannot_be_mutated() -> None:
    with pytest.raises(ValidationError):
        config().seed = 3  # type: ignore[misc]


def test_what_counts_as_mathematics() -> None:
    flat = mathematics(config(lr_scheduler_type="constant"))
    assert flat["task.max_length"] == 128
    assert flat["direction.rank"] == 1
    assert "model" not in flat and "task.train" not in flat
    for key in ("replicas", "threads_per_replica", "eval_steps", "task.eval", "output_dir", "memory.kind", "max_steps"):
        assert key not in flat
    assert mathematics(config(trainable={"lora": {}}))["trainable.lora.r"] == 8
    assert mathematics(config(trainable={"prefix": {}}))["trainable.prefix.num_virtual_tokens"] == 5
    sparse = mathematics(config(trainable={"sparse": {}}))
    assert (sparse["trainable.sparse.sparsity"], sparse["trainable.sparse.parameters"]) == (0.75, "full")
    blocks = mathematics(config(trainable={"blocks": {"count": 3}}, optimizer={"normalize": "none"}, learning_rate=1.0))
    assert (blocks["trainable.blocks.count"], blocks["trainable.blocks.steps"]) == (3, 1)


@pytest.mark.parametrize(
    ("keys", "needed"),
    [
        ({}, True),
        ({"lr_scheduler_type": "constant"}, False),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}, False),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.1}, True),
        ({"lr_scheduler_type": "inverse_sqrt"}, False),
        ({"lr_scheduler_type": "linear"}, True),
        ({"lr_scheduler_type": "cosine"}, True),
        ({"lr_scheduler_type": "cosine_with_restarts"}, True),
        ({"lr_scheduler_type": "polynomial"}, True),
    ],
)
def test_max_steps_is_mathematical_only_with_a_schedule_over_it(keys: dict[str, Any], needed: bool) -> None:
    old, new = config(**keys), config(**{**keys, "max_steps": 20})
    assert schedule_needs_max_steps(old) is needed
    assert changed(old, new) == ([("max_steps", 10, 20)] if needed else [])


def test_changed_names_only_mathematical_keys() -> None:
    old = config()
    assert changed(old, config(replicas=7, metrics_port=9, save_steps=3, logging_steps=1)) == []
    assert changed(old, config(epsilon=1e-2, seed=4)) == [("seed", 0, 4), ("epsilon", 1e-3, 1e-2)]
    lora = changed(old, config(trainable={"lora": {}}))
    assert ("trainable", "full", None) in lora
    assert ("trainable.lora.r", None, 8) in lora


@pytest.mark.parametrize(
    "section",
    [
        RunConfig,
        CausalLMTask,
        ClassificationTask,
        PromptedTask,
        MultipleChoiceTask,
        GenerationTask,
        DirectionConfig,
        ResidentMemory,
        Zero3Memory,
        StreamedMemory,
        LoraConfig,
        PrefixConfig,
        SparseConfig,
        BlocksConfig,
        TrainableLora,
        ReplicaRange,
    ],
)
def test_every_key_is_described_and_marked(section: type[BaseModel]) -> None:
    for name, field in section.model_fields.items():
        assert field.description, name
        assert isinstance(field.json_schema_extra, dict), name
        assert field.json_schema_extra["mathematics"] in (True, False, "content"), name


@pytest.mark.parametrize("key", ["model", "task.train", "task.eval", "snapshot_dir"])
def test_addresses_with_credentials_are_refused_and_not_shown(file: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="has credentials in it") as caught:
        load(file, [f"{key}=s3://KEY:SEC/RET@bucket/a"])
    assert key in str(caught.value.where) and "RET" not in caught.value.what


def test_documentation_is_up_to_date() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == markdown(), "run: python -m zoray.config.docs > docs/configuration.md"


@pytest.mark.parametrize("gpus", [0.5, 2.0])
def test_each_shard_has_one_accelerator_or_none(file: Path, gpus: float) -> None:
    sharded = ["memory={kind: zero3, shards: 2}"]
    for right in (0.0, 1.0):
        needs = load(file, [*sharded, f"gpus_per_replica={right}", "threads_per_replica=3"]).needs
        assert needs == {"CPU": 6.0, "GPU": 2 * right}
    with pytest.raises(ConfigError, match="Each of the 2 processes"):
        load(file, [*sharded, f"gpus_per_replica={gpus}"])
    assert load(file, [f"gpus_per_replica={gpus}"]).needs["GPU"] == gpus


def test_replicas_are_a_number_or_a_range() -> None:
    assert config(replicas=3).replica_limits == (1, None, 3)
    assert config(replicas={"max": 64}).replica_limits == (1, 64, 64)
    for wrong in (0, "4", {"min": 2}, {"min": 0, "max": 2}, {"min": 3, "max": 2}, {"max": 2, "maximum": 3}):
        with pytest.raises(ValidationError):
            config(replicas=wrong)


def test_example_of_the_documentation_kind_is_yaml() -> None:
    assert yaml.safe_load(dump(config()))["task"]["kind"] == "causal_lm"


def test_import_is_light() -> None:
    heavy = "torch, transformers, ray, pyarrow, numpy"
    code = f"import sys, zoray.config; print([m for m in '{heavy}'.split(', ') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
