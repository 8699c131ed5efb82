"""Plans: what is predicted from a configuration alone, against what real models take; and the command that says it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import S3, make_model
from tests.unit.helpers import commit_of
from tests.unit.run_builder import write_config
from tests.unit.test_architectures import MODELS
from tests.unit.test_cli import Zoray, zoray
from zoray import product
from zoray.config import DIFFERENTIATING, MemoryConfig, RunConfig, load
from zoray.errors import ConfigError, ModelError
from zoray.inputs import find_mixtures, random_texts
from zoray.models import blank_model, load_model, selection
from zoray.planning import Fit, Machine, Need, Place, Plan, Planner, Work, measure, needs, storage
from zoray.planning.live import Peak
from zoray.planning.needs import _LAYOUTS, DEEPSPEED_BYTES, PROCESS_BYTES
from zoray.proof import Verdict
from zoray.replica import Replica

__all__ = ["zoray"]  # a fixture, which nothing here calls by its name

GIB = 1 << 30
VERDICT = Verdict(True, True)
ZERO3 = {"kind": "zero3", "shards": 2}


def work_of(*sizes: int, width: int = 4, **passing: int) -> Work:
    return Work(tuple((size, width, True) for size in sizes), 0, max(sizes) * width, 0, 0, 0, 0, passing, VERDICT)


PLAIN = {"learning_rate": 1e-6, "optimizer": {"normalize": "none"}}


def config_of(folder: Path, kind: str = "causal_lm", **keys: Any) -> RunConfig:
    """A run of a model in a folder; of its data, a plan looks at no more than that they are named."""
    task = {"kind": kind, "train": "t", "eval": "e", "max_length": 32, **keys.pop("task", {})}
    sizes = {"per_direction_batch_size": 4, "per_device_eval_batch_size": 6}
    return RunConfig.model_validate({"model": str(folder), "max_steps": 9, "task": task, **PLAIN, **sizes, **keys})


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which nothing but config.json is there."""
    made = make_model("gpt2", tmp_path_factory.mktemp("plan"), vocab_size=4096)
    for path in made.iterdir():
        if path.name != "config.json":
            path.unlink()
    return made


# ---- a model without weights ----


@pytest.mark.parametrize("kind", ["causal_lm", "classification"])
@pytest.mark.parametrize(
    "trainable",
    [
        "full",
        "attn",
        "bias_and_norm",
        {"lora": {"r": 2, "target_modules": ["c_attn"]}},
        {"prefix": {}},
        {"sparse": {"parameters": "attn"}},
    ],
)
def test_a_blank_model_has_the_parameters_of_the_loaded_one(kind: str, trainable: Any, tmp_path: Path) -> None:
    folder = make_model("gpt2", tmp_path)
    config = config_of(folder, kind, trainable=trainable, dtype="bfloat16")
    labels = 3 if kind == "classification" else None

    def facts(model: torch.nn.Module) -> dict[str, Any]:
        named = model.named_parameters(remove_duplicate=False)
        return {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in named}

    blank = blank_model(config, labels)
    assert {p.device.type for p in blank.parameters()} == {"meta"}
    assert facts(blank) == facts(load_model(config, num_labels=labels))


def test_a_blank_model_needs_no_more_than_its_description(gpt2: Path) -> None:
    assert sum(p.numel() for p in blank_model(config_of(gpt2)).parameters()) > 4096 * 32


def test_of_a_model_on_an_object_store_only_the_description_is_read(
    s3: S3, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZORAY_CACHE", str(tmp_path / "cache"))
    place = s3.put(gpt2, "model")
    s3.write(b"no weights at all", "model", "model.safetensors")
    found, here = (blank_model(config_of(Path("m"), model=name)) for name in (place, str(gpt2)))
    assert [p.shape for p in found.parameters()] == [p.shape for p in here.parameters()]
    assert not (tmp_path / "cache").exists()


def test_quantised_weights_are_not_guessed_at(gpt2: Path, tmp_path: Path) -> None:
    settings = json.loads((gpt2 / "config.json").read_text())
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps({**settings, "quantization_config": quantised}))
    with pytest.raises(ModelError, match="quantised"):
        blank_model(config_of(tmp_path))


# ---- what is measured without memory, against what is taken ----

ARCHITECTURES = ("gpt2", "opt", "llama", "gemma2", "mixtral", "falcon", "mamba", "bert", "mpnet")


def taken(config: RunConfig, num_labels: int | None) -> tuple[dict[str, int], Verdict]:
    """Peaks of a real replica's work."""
    rows, width = config.per_direction_batch_size, config.task.max_length
    model, kind = load_model(config, num_labels=num_labels), config.direction.kind
    replica = Replica(
        model,
        direction=kind,
        signs=config.signs,
        head=config.head,
        estimator=config.estimator,
        selection=selection(config),
    )

    def batch(count: int, seed: int = 1) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 90, (count, width), generator=torch.Generator().manual_seed(seed))
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        if num_labels is not None:
            found["attention_mask"][0, -3:] = 0
            found["labels"] = ids[:, 0] % num_labels
        return found

    work: dict[str, Callable[[], Any]] = {
        "proof of the fast paths": lambda: replica.prove(batch(rows)),
        "probe": lambda: replica.probe(0, 0, batch(rows, 2), 1e-3),
        "evaluation": lambda: replica.evaluate(batch(config.per_device_eval_batch_size)),
        "digest": replica.digest,
    }
    peaks = {}
    for name, do in work.items():
        with Peak() as peak:
            do()
        peaks[name] = peak.peak
    assert replica.verdict is not None
    return peaks, replica.verdict


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_predicted_peaks_are_those_of_real_models(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    model.save_pretrained(tmp_path)
    labels = 3 if "Sequence" in type(model).__name__ else None
    config = config_of(tmp_path, "causal_lm" if labels is None else "classification")
    real, verdict = taken(config, labels)
    work = measure(config, labels)
    assert (work.verdict.batched, work.verdict.chunked) == (verdict.batched, verdict.chunked), verdict.reasons
    assert work.weights() == sum(p.numel() * p.element_size() for p in model.parameters())
    predicted = {name: work.passing[name] for name in real}
    assert predicted == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_finding_inputs_takes_is_about_what_is_predicted(name: str, tmp_path: Path) -> None:
    """Of small models its tensors, whose number is not counted one by one."""
    torch.manual_seed(0)
    MODELS[name][0]().save_pretrained(tmp_path)
    labels = 3 if name in ("bert", "mpnet") else None
    config = config_of(tmp_path, "causal_lm" if labels is None else "classification")
    model = load_model(config, num_labels=labels)
    texts = random_texts(model, 0)
    if labels is not None:
        # As long as those of training examples are.
        texts = {name: values.repeat(1, 4) for name, values in texts.items()}
    with Peak() as peak:
        found = find_mixtures(model, texts, 0)
    work = measure(config, labels)
    assert 0.6 * peak.peak < work.passing["finding the inputs of layers"] < 3 * peak.peak
    assert work.inputs == sum(mixture.values.nbytes for mixture in found.values())


def test_finding_inputs_takes_no_copy_of_embeddings_or_a_head(tmp_path: Path) -> None:
    wide = {"vocab_size": 20_000, "tie_word_embeddings": False}
    for kind in ("llama", "gemma"):
        config = config_of(make_model(kind, tmp_path / kind, **wide))
        model = load_model(config)
        with Peak() as peak:
            find_mixtures(model, random_texts(model, 0), 0)
        table = 8 * model.get_input_embeddings().weight.numel()
        assert peak.peak < table / 2 and measure(config).passing["finding the inputs of layers"] < table / 2


KEYS: list[dict[str, Any]] = [
    {"dtype": "bfloat16"},
    {"signs": "sequential"},
    {"head": "full"},
    {"direction": {"kind": "rademacher"}},
    {"direction": {"kind": "gaussian"}},
    {"attn_implementation": "eager"},
    {"estimator": "one_sided", "directions_per_batch": 16},
    {"estimator": "forward_gradient"},
    {"estimator": "forward_gradient", "dtype": "bfloat16", "direction": {"kind": "rademacher"}},
    {"estimator": "backprop"},
    {"estimator": "backprop", "dtype": "bfloat16"},
    {"trainable": "bias_and_norm"},
    {"trainable": {"prefix": {"num_virtual_tokens": 5}}},
    {"trainable": {"sparse": {"sparsity": 0.75}}},
    {"trainable": {"sparse": {"sparsity": 0.75}}, "dtype": "bfloat16"},
    {"trainable": {"sparse": {"sparsity": 0.75}}, "direction": {"kind": "rademacher"}},
    {"trainable": {"sparse": {"sparsity": 0.75}}, "estimator": "backprop"},
    {"trainable": {"sparse": {"sparsity": 0.75}}, "estimator": "forward_gradient"},
    {"trainable": {"blocks": {"count": 2}}},
]


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_predicted_peaks_follow_the_configuration(keys: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(make_model("llama", tmp_path), **keys)
    real, _ = taken(config, None)
    work = measure(config)
    assert {name: work.passing[name] for name in real} == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("int8", [True, False])
def test_a_predicted_update_holds_for_one_that_catches_up(
    int8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With either product; which one a process takes is the outcome of a race, and a busy machine's may differ."""
    if int8 and not product.int8_product_is_exact():
        pytest.skip("this processor's int8 product is not exact, so it is never used")
    monkeypatch.setattr(product, "_int8_product_is_better", lambda: int8)
    config = config_of(make_model("gpt2", tmp_path, vocab_size=40000), per_direction_batch_size=1)
    replica = Replica(load_model(config))
    with Peak() as peak:
        replica.apply([commit_of(step, [5] * 64) for step in range(16)])
    # What NumPy has beside the tensors is part of it.
    assert peak.peak <= measure(config).passing["update"] <= peak.peak + (256 << 20)


def test_more_rows_take_more_and_one_sign_at_a_time_no_more(gpt2: Path) -> None:
    config = config_of(gpt2)
    work, doubled, sequential = (
        measure(config.model_copy(update=keys)).passing
        for keys in ({}, {"per_direction_batch_size": 8}, {"signs": "sequential"})
    )
    assert 1.5 * work["probe"] < doubled["probe"] < 2.5 * work["probe"]
    assert doubled["evaluation"] == work["evaluation"]
    assert sequential["probe"] < work["probe"]


def test_gathered_modules_are_there_once_and_no_longer_than_they_are_used(gpt2: Path) -> None:
    whole, parts = measure(config_of(gpt2)), measure(config_of(gpt2, memory=ZERO3), shards=2)
    for name in ("probe", "evaluation"):
        extra = parts.passing[name] - whole.passing[name]
        assert 0 < extra <= 2 * whole.largest_module < 2 * whole.weights()
    # The head is used after its module's call.
    assert parts.passing["probe"] >= whole.largest_module
    assert whole.weights() / 2 <= parts.weights(2) <= whole.weights() / 2 + 4 * len(parts.parameters)


def test_what_depends_on_values_is_an_error_with_advice(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2Model

    before = GPT2Model.forward

    def forward(self: Any, input_ids: torch.Tensor, **keys: Any) -> Any:
        return before(self, input_ids[:, : input_ids.unique().numel()], **keys)

    monkeypatch.setattr(GPT2Model, "forward", forward)
    with pytest.raises(ModelError, match="cannot be counted without running it"):
        measure(config_of(gpt2))


# ---- adding up ----


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=9), st.integers(1, 9), st.sampled_from([2, 4]))
def test_each_of_so_many_processes_holds_as_much_as_the_first(sizes: list[int], shards: int, width: int) -> None:
    work = work_of(*sizes, width=width)
    memory = {"kind": "zero3", "shards": shards}
    need = needs(config_of(Path("m"), memory=memory), work)
    assert need.host.lasting["weights"] == sum(-(-size // shards) * width for size in sizes)
    assert need.host.peak >= sum(need.host.lasting.values()) + work.largest_module


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=9), st.integers(1, 9))
def test_offloaded_parts_are_in_files_or_in_the_host_s_memory(sizes: list[int], shards: int) -> None:
    place = {"kind": "zero3", "shards": shards, "offload": "nvme", "nvme_path": "/d"}
    need = needs(config_of(Path("m"), memory=place, gpus_per_replica=1), work_of(*sizes))
    parts = work_of(*sizes).weights(shards)
    assert need.files["weights"] + need.host.lasting["small weights"] == parts
    assert "weights" not in need.device.lasting and need.host.passing["snapshot"] == parts


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=9), st.integers(1, 9))
def test_parts_that_an_accelerator_reads_by_itself_lie_in_powers_of_two(sizes: list[int], shards: int) -> None:
    memory = {"kind": "zero3", "shards": shards, "offload": "cpu"}
    here, away = (
        needs(config_of(Path("m"), memory=memory, gpus_per_replica=gpus), work_of(*sizes)).host.lasting["weights"]
        for gpus in (0, 1)
    )
    assert here <= away < 2 * here or here == away == work_of(*sizes).weights(shards)
    assert here == sum(-(-size // shards) * 4 for size in sizes)
    single = needs(config_of(Path("m"), memory=memory, gpus_per_replica=1), work_of(sizes[0])).host.lasting["weights"]
    assert single.bit_count() == 1 and single >= -(-sizes[0] // shards) * 4


def test_streamed_weights_have_two_blocks_and_the_largest_other_module_on_the_device(gpt2: Path) -> None:
    keys: dict[str, Any] = {"gpus_per_replica": 1, "memory": {"kind": "streamed"}}
    model = blank_model(config_of(gpt2))
    block = sum(p.numel() * 4 for p in model.get_submodule("transformer.h.0").parameters())
    embedding = model.get_parameter("transformer.wte.weight").numel() * 4
    made = Planner(config_of(gpt2, **keys)).plan()
    weights = made.work.weights()
    assert 2 * block + embedding <= made.need.device.lasting["blocks of weights"] <= 1.01 * (2 * block + embedding)
    assert made.need.host.lasting["weights"] == weights and not made.need.files
    in_files = {**keys, "memory": {"kind": "streamed", "offload": "nvme", "nvme_path": "/d"}}
    need = Planner(config_of(gpt2, **in_files)).plan().need
    assert need.files["weights"] == weights and "weights" not in need.host.lasting
    assert need.host.passing["loading"] == embedding


def test_without_an_accelerator_everything_is_in_the_host_s_memory() -> None:
    work = work_of(1000, probe=50, evaluation=70)
    config = config_of(Path("m"))
    alone = needs(config, work)
    assert alone.device.peak == 0 and alone.host.peak == PROCESS_BYTES + 4000 + 70
    sharded = needs(config.model_copy(update={"memory": load_memory(ZERO3)}), work)
    assert sharded.host.peak == PROCESS_BYTES + DEEPSPEED_BYTES + 2000 + 4000
    accelerated = needs(config_of(Path("m"), gpus_per_replica=1), work)
    assert accelerated.device.passing == {"probe": 50, "evaluation": 70}
    assert accelerated.host.peak == PROCESS_BYTES + 4000


def test_what_the_c_library_keeps_is_counted_where_modules_are_gathered_in_the_host_s_memory() -> None:
    work = replace(work_of(1000), pieces=300)
    for keys, kept in (({"memory": ZERO3}, 600), ({}, 0), ({"memory": ZERO3, "gpus_per_replica": 1}, 0)):
        found = needs(config_of(Path("m"), **keys), work)
        assert found.host.lasting.get("kept of gathered modules", 0) == kept


def test_modules_of_several_pieces_are_counted_by_what_is_gathered_at_once(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_layer=1, n_embd=64, n_head=4, vocab_size=200_000).save_pretrained(tmp_path)
    work = measure(config_of(tmp_path))
    # The embedding, of 49 MiB, is mapped; it is also the head's.
    assert work.pieces == work.weights() - 200_000 * 64 * 4
    assert work.tied == 200_000 * 64 * 4


def load_memory(keys: dict[str, Any]) -> Any:
    return config_of(Path("m"), memory=keys).memory


def test_every_kind_of_memory_has_a_layout() -> None:
    assert set(_LAYOUTS) == set(get_args(get_args(MemoryConfig)[0]))


def test_a_kind_without_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(Path("m"))
    monkeypatch.delitem(_LAYOUTS, type(config.memory))
    with pytest.raises(ConfigError, match="resident"):
        needs(config, work_of(1))


def test_snapshots_and_ledger() -> None:
    work = work_of(1000)
    kept = storage(config_of(Path("m"), directions=5), work)
    assert kept == {"snapshots": 3 * 4000, "ledger": 9 * 70}
    assert storage(config_of(Path("m"), save_steps=2), work)["snapshots"] == 6 * 4000
    assert storage(config_of(Path("m"), save_steps=2, save_total_limit=1), work)["snapshots"] == 2 * 4000


# ---- what fits ----


def plan_of(host: int, device: int = 0, **keys: Any) -> Plan:
    need = Need(Place({"weights": device}), Place({"weights": host}), {}, 0)
    return Plan(config_of(Path("m"), **keys), work_of(1), need)


@pytest.mark.parametrize(
    ("plan", "machine", "replicas", "missing"),
    [
        (plan_of(2 * GIB), Machine(7 * GIB), 3, ""),
        (plan_of(2 * GIB), Machine(GIB), 0, "2.0 GiB of a machine's memory, which has 1.0"),
        (plan_of(2 * GIB, memory=ZERO3), Machine(7 * GIB), 1, ""),
        (plan_of(1, GIB, gpus_per_replica=1), Machine(GIB, GIB, 8), 8, ""),
        (plan_of(1, GIB, gpus_per_replica=1, memory=ZERO3), Machine(GIB, GIB, 5), 2, ""),
        (plan_of(1, GIB, gpus_per_replica=0.5), Machine(GIB, GIB, 8), 0, "1.0 GiB of an accelerator, and has 0.5"),
        (plan_of(1, GIB, gpus_per_replica=0.1), Machine(GIB, 10 * GIB, 1), 10, ""),
        (plan_of(1, GIB, gpus_per_replica=1, memory=ZERO3), Machine(GIB, GIB, 1), 0, "takes 2 accelerators"),
        (plan_of(GIB, GIB, gpus_per_replica=1), Machine(3 * GIB, GIB, 8), 3, ""),
    ],
)
def test_how_many_replicas_fit(plan: Plan, machine: Machine, replicas: int, missing: str) -> None:
    fit = plan.fit(machine)
    assert fit == Fit(replicas, fit.missing) and missing in "; ".join(fit.missing)
    assert bool(missing) == bool(fit.missing)


def test_every_change_that_is_named_fits(gpt2: Path) -> None:
    planner = Planner(config_of(gpt2, gpus_per_replica=1, per_direction_batch_size=64))
    need = planner.plan().need.device
    lasting = sum(need.lasting.values())
    for device in ((need.peak + lasting) // 2, lasting // 2):
        machine = Machine(64 * GIB, device, 4)
        assert not planner.plan().fit(machine).replicas
        changes = planner.changes(machine)
        assert all(change.plan.fit(machine).replicas for change in changes)
        assert bool(changes) == (device > lasting)


def test_of_smaller_batches_the_largest_that_fits_is_named(gpt2: Path) -> None:
    planner = Planner(config_of(gpt2, per_direction_batch_size=64, per_device_eval_batch_size=1))
    half = planner.plan(per_direction_batch_size=32).need.host.peak
    found = [change.keys for change in planner.changes(Machine(half)) if "per_direction_batch_size" in change.keys]
    assert found == [{"per_direction_batch_size": 32}]


def test_where_derivatives_do_not_fit_differences_are_named(gpt2: Path) -> None:
    keys = {"gpus_per_replica": 1, "estimator": "forward_gradient", "per_direction_batch_size": 64}
    planner = Planner(config_of(gpt2, **keys))
    device, plain = planner.plan().need.device.peak, planner.plan(estimator="spsa").need.device.peak
    assert plain < device
    assert planner.changes(Machine(64 * GIB, (device + plain) // 2, 1))[0].keys == {"estimator": "spsa"}


@pytest.mark.parametrize("estimator", DIFFERENTIATING)
def test_weights_are_put_elsewhere_only_for_differences(gpt2: Path, estimator: str) -> None:
    planner = Planner(config_of(gpt2, gpus_per_replica=1, estimator=estimator, per_direction_batch_size=64))
    room = planner.plan(estimator="spsa", memory={"kind": "streamed"}).need.device.peak
    found = planner.changes(Machine(64 * GIB, room, 1))
    assert any("memory" in change.keys for change in found)
    assert all(change.keys.get("estimator") == "spsa" for change in found if "memory" in change.keys)


# ---- the command ----


def test_plan_of_a_run_that_fits(zoray: Zoray, tmp_path: Path) -> None:
    path = write_config(tmp_path / "run")
    said = zoray("plan", str(path), "--host-memory", "2GiB")
    assert (said.status, said.err) == (0, "")
    for words in ("both signs in one forward of 4 rows of 8 tokens", "resident", "probe", "at most", "5 replicas fit"):
        assert words in said.out
    assert not (tmp_path / "run" / "runs").exists()


def test_plan_of_a_run_that_does_not_fit_names_what_would(zoray: Zoray, tmp_path: Path) -> None:
    base = str(make_model("gpt2", tmp_path, vocab_size=50000, n_embd=64, n_layer=1))
    path = write_config(tmp_path / "run", base=base, per_direction_batch_size=64, task={"max_length": 32})
    words = [str(path), "--host-memory", "600MiB"]
    said = zoray("plan", *words)
    assert said.status == 7 and "Not one replica fits" in said.err and "What would fit:" in said.out
    lines = [line.strip() for line in said.out.partition("What would fit:")[2].splitlines()]
    changes = [line for line in lines if "=" in line]
    assert changes
    for change in changes:
        assert zoray("plan", *words, *shlex.split(change)).status == 0


def test_plan_in_json(zoray: Zoray, tmp_path: Path) -> None:
    path = write_config(tmp_path / "run")
    options = ["--json", "--host-memory", "64GiB", "--device-memory", "1GB", "--devices-per-machine", "4"]
    said = zoray("plan", str(path), "memory={kind: zero3, shards: 2}", "gpus_per_replica=1", *options)
    assert said.status == 0
    facts = json.loads(said.out)
    process = facts["process"]["device"]
    assert process["peak"] == sum(process["lasting"].values()) + max(process["passing"].values())
    assert facts["machine"] == {"host": 64 * GIB, "device": 10**9, "devices": 4}
    assert (facts["fits"], facts["replicas_per_machine"], facts["processes_per_replica"]) == (True, 2, 2)


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["--host-memory", "much"], 2, "'much' is not an amount of memory"),
        (["gpus_per_replica=1", "--devices-per-machine", "2"], 2, "--device-memory 80GiB"),
        (["gpus_per_replica=1"], 7, "an accelerator"),
        (["model=/nowhere"], 4, "There is no folder /nowhere."),
        (["model=someone/something"], 4, "Its config.json is enough"),
        (["task.max_length=100000"], 2, "at most 64 tokens"),
        (["trainable=nothing"], 2, "matches none"),
        (["signs=batch"], 2, "signs"),
    ],
)
def test_plans_that_cannot_be_made(
    zoray: Zoray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], status: int, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = zoray("plan", str(write_config(tmp_path / "run")), *words)
    assert said.status == status and reason in said.err


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"model_type": "martian"}, "martian"), ({"model_type": "vit"}, "cannot be loaded as a causal language model")],
)
def test_a_model_that_cannot_be_planned(zoray: Zoray, tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    path = write_config(tmp_path / "run")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    said = zoray("plan", str(path), f"model={tmp_path}")
    assert said.status == 4 and reason in said.err


def test_a_prediction_is_of_the_configuration_as_resolved(tmp_path: Path) -> None:
    path = write_config(tmp_path / "run", dtype="bfloat16")
    folder = load(path)
    assert Planner(folder).plan().work.weights() * 2 == Planner(folder).plan(dtype="float32").work.weights()
