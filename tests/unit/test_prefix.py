"""Prefixes: what they begin as, that it is the same everywhere, and that they are perturbed right."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_model
from tests.unit.helpers import bits, printed_elsewhere
from tests.unit.test_architectures import MODELS, check, load
from tests.unit.test_models import config, logits, refused, trainable
from tests.unit.test_streamed import same
from zoray.errors import ConfigError
from zoray.exact import in_float64
from zoray.memory.spill import streamed_loading
from zoray.memory.streamed import Streamed, Streaming
from zoray.models import check_lengths, load_model
from zoray.models.prefix import _activations, add_prefix
from zoray.replica import Replica

PREFIX = {"prefix": {"num_virtual_tokens": 3}}
WEIGHT = "prompt_encoder.default.embedding.weight"
DECODERS = ["gpt2", "opt", "llama", "qwen3", "gemma", "mistral", "mixtral"]


@pytest.mark.parametrize("kind", DECODERS)
def test_a_prefix_begins_as_tokens_in_front_of_the_text(tmp_path: Path, kind: str) -> None:
    folder = make_model(kind, tmp_path)
    plain = load_model(config(folder))
    model = load_model(config(folder, trainable=PREFIX))
    assert trainable(model) == [WEIGHT] and not model.training
    torch.manual_seed(0)
    tokens = torch.randint(128, (1, 3))
    ids = torch.arange(16).reshape(2, 8) % 40 + 6
    whole = torch.cat([tokens.expand(2, -1), ids], 1)
    with torch.no_grad():
        expected = plain(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[:, 3:]
    # The values are rounded, to a 256th of the largest.
    assert float((logits(model) - expected).abs().max()) < 0.05 * float((logits(plain) - expected).abs().max())


def test_every_process_makes_the_same_prefix(tmp_path: Path) -> None:
    """Also with other numbers of threads and another kernel for attention, whose float32 sums have other bits."""
    folder = make_model("llama", tmp_path, hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    code = (
        "import torch, sys\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "from tests.unit.test_models import config\n"
        "from zoray.models import load_model\n"
        "torch.rand(5)\n"
        "run = config(sys.argv[1], trainable={'prefix': {}}, attn_implementation=sys.argv[2])\n"
        f"print(load_model(run).get_parameter({WEIGHT!r}).double().flatten().tolist())\n"
    )
    found = printed_elsewhere(code, folder)
    assert len(found) == 1
    run = config(folder, trainable={"prefix": {}})
    mine = load_model(run).get_parameter(WEIGHT)
    assert found == {f"{mine.double().flatten().tolist()}\n"}
    other = load_model(config(folder, trainable={"prefix": {}}, seed=1)).get_parameter(WEIGHT)
    assert not torch.equal(mine, other)


@pytest.mark.parametrize("kind", [*DECODERS, "bert", "roberta"])
def test_activations_are_computed_in_float64(tmp_path: Path, kind: str) -> None:
    """Before they are rounded, two ways to compute attention differ by less than any float32 computation could."""
    from transformers import DynamicCache

    folder = make_model(kind, tmp_path)
    task = "classification" if "bert" in kind else "causal_lm"
    found = []
    for attention in ("eager", "sdpa"):
        model: Any = load_model(config(folder, task, attn_implementation=attention, dtype="bfloat16"), num_labels=2)
        before = {name: (id(p), bits(p)) for name, p in model.named_parameters()}
        cache: Any = DynamicCache(config=model.config)
        with torch.no_grad(), in_float64(model):
            model(input_ids=torch.arange(6, 12)[None], past_key_values=cache, use_cache=True)
        found.append(torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers]))
        for name, parameter in model.named_parameters():
            assert id(parameter) == before[name][0] and torch.equal(bits(parameter), before[name][1])
    assert found[0].dtype == torch.float64 and float(found[0].abs().max()) > 0.01
    assert float((found[0] - found[1]).abs().max()) < 1e-13


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "qwen3", "gemma2", "mixtral", "bert", "roberta"])
def test_perturbed_losses_are_those_of_perturbed_prefixes(name: str, tmp_path: Path) -> None:
    """In one forward for both signs, with the head in slices, as without a prefix."""
    make, batched, chunked = MODELS[name]
    model = load(make, tmp_path).eval()
    kind = "classification" if "Sequence" in type(model).__name__ else "causal_lm"
    run = config("m", kind, trainable={"prefix": {"num_virtual_tokens": 4}})
    assert not isinstance(run.trainable, str)
    wrapped: Any = add_prefix(model, run.trainable.prefix, run, [])  # type: ignore[union-attr]
    replica = check(wrapped.eval(), 5e-7 if name == "bert" else 2e-6)
    assert WEIGHT in [spec.name for spec in replica.layout.specs]
    assert replica.verdict is not None
    assert (replica.verdict.batched, replica.verdict.chunked) == (batched, chunked), replica.verdict.reasons


def test_a_prefix_streams(tmp_path: Path) -> None:
    folder = make_model("gpt2", tmp_path)
    there = tmp_path / "there"
    there.mkdir()
    resident = Replica(load_model(config(folder, trainable=PREFIX)), 7)
    for streaming in (Streaming(), Streaming("nvme", there)):
        with streamed_loading(streaming):
            model = load_model(config(folder, trainable=PREFIX))
        twin = Replica(copy.deepcopy(resident.model), 7)
        same(twin, Replica(model, 7, memory=partial(Streamed, streaming=streaming)))


@pytest.mark.parametrize(("kind", "head"), [("bert", "classifier"), ("roberta", "classifier"), ("gpt2", "score")])
def test_a_new_head_is_trained_beside_the_prefix(tmp_path: Path, kind: str, head: str) -> None:
    source = {"head": "classification"} if kind == "bert" else {}
    run = config(make_model(kind, tmp_path, **source), "classification", trainable=PREFIX)
    model = load_model(run, num_labels=2)
    names = trainable(model)
    assert WEIGHT in names and all(name == WEIGHT or f".{head}." in name for name in names) and len(names) > 1


def test_what_peft_would_lose_is_refused(tmp_path: Path) -> None:
    run = config(make_model("bert", tmp_path, head="masked_lm"), "classification", trainable=PREFIX)
    said = refused(run, num_labels=3)
    assert "bert.pooler.dense.bias" in said and "lora" in said


def test_models_without_keys_and_values(tmp_path: Path) -> None:
    run = config(make_model("t5", tmp_path), "classification", trainable=PREFIX)
    assert "cannot be given a prefix" in refused(run, num_labels=2)


def test_a_prefix_is_of_the_models_dtype_and_aligned(tmp_path: Path) -> None:
    model = load_model(config(make_model("llama", tmp_path), trainable=PREFIX, dtype="bfloat16"))
    weight = model.get_parameter(WEIGHT)
    assert weight.dtype == torch.bfloat16 and weight.data_ptr() % 64 == 0 and weight.is_contiguous()
    assert float(weight.abs().max()) > 0


def test_a_prefix_takes_positions(tmp_path: Path) -> None:
    run = config(make_model("gpt2", tmp_path), max_length=62, trainable=PREFIX)
    with pytest.raises(ConfigError, match="at most 61 tokens"):
        check_lengths(run, load_model(run))
    check_lengths(run.model_copy(update={"task": run.task.model_copy(update={"max_length": 61})}), load_model(run))


def test_values_are_on_a_grid() -> None:
    torch.manual_seed(0)
    model = MODELS["llama"][0]().eval()
    values = _activations(model, 5)
    for layer in range(values.shape[1]):
        for part in range(2):
            each = values[:, layer, part]
            steps = each / 2.0 ** (int(torch.frexp(each.abs().max()).exponent) - 8)
            assert torch.equal(steps, steps.round()) and 128 <= float(steps.abs().max()) <= 256
