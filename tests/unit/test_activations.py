"""Adapters that begin as inputs of their modules: what these are, the same everywhere, and perturbed right."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.conftest import make_model
from tests.unit.helpers import printed_elsewhere
from tests.unit.test_architectures import MODELS, check, load
from tests.unit.test_models import config, logits, refused, trainable
from tests.unit.test_streamed import same
from zoray.config import RunConfig
from zoray.errors import ConfigError
from zoray.memory.spill import streamed_loading
from zoray.memory.streamed import Streamed, Streaming
from zoray.models import blank_model, load_model
from zoray.models.activations import lora_layers, random_texts, scaled_rows
from zoray.models.trainable import add_adapters
from zoray.replica import Replica

R = 3


def adapters(**more: Any) -> dict[str, Any]:
    return {"lora": {"r": R, "target_modules": "all-linear", "init_lora_weights": "activations", **more}}


def run(kind: str, folder: Path, **more: Any) -> RunConfig:
    return config(folder, "classification" if kind == "bert" else "causal_lm", **{"trainable": adapters(), **more})


def loaded(kind: str, folder: Path, **more: Any) -> Any:
    return load_model(run(kind, folder, **more), num_labels=2 if kind == "bert" else None)


def frozen(model: Any) -> dict[str, torch.Tensor]:
    return {name: module.lora_A["default"].weight for name, module in lora_layers(model)}  # type: ignore[index,union-attr]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "qwen3", "gemma", "mistral"])
def test_they_begin_as_inputs_and_b_alone_is_trained(tmp_path: Path, kind: str) -> None:
    folder = make_model(kind, tmp_path)
    model, plain = loaded(kind, folder), load_model(config(folder))
    names = trainable(model)
    assert names and all("lora_B" in name for name in names) and not model.training
    assert torch.equal(logits(model), logits(plain))
    seen: dict[str, torch.Tensor] = {}
    for name in frozen(model):
        short = name.removeprefix("base_model.model.")
        module = plain.get_submodule(short)
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))  # type: ignore[misc]
    torch.manual_seed(0)
    with torch.no_grad():
        plain(**random_texts(plain, R))
    for name, rows in frozen(model).items():
        width = rows.shape[1]
        last = seen[name].reshape(R, -1, width)[:, -1]
        expected = last / last.norm(dim=1, keepdim=True) * (width / R) ** 0.5
        # The inputs are rounded, to a 256th of a row's largest, or a little less.
        off = (rows - expected).abs().amax(1)
        assert bool((off < 0.005 * expected.abs().amax(1)).all()), name
        assert not rows.requires_grad


def test_a_new_head_is_trained_beside_them(tmp_path: Path) -> None:
    names = trainable(loaded("bert", make_model("bert", tmp_path)))
    heads = {name for name in names if "lora_B" not in name}
    assert heads and all(".classifier." in name or ".pooler." in name for name in heads) and len(heads) < len(names)


def test_every_process_makes_the_same(tmp_path: Path) -> None:
    """Also with other numbers of threads and another kernel for attention, whose float32 sums have other bits."""
    folder = make_model("llama", tmp_path, hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "from pathlib import Path\n"
        "from tests.unit.test_activations import frozen, loaded\n"
        "torch.rand(5)\n"
        "found = frozen(loaded('llama', Path(sys.argv[1]), attn_implementation=sys.argv[2]))\n"
        "print(hash(tuple(x for rows in found.values() for x in rows.flatten().tolist())))\n"
    )
    found = printed_elsewhere(code, folder)
    mine = frozen(loaded("llama", folder))
    assert found == {f"{hash(tuple(x for rows in mine.values() for x in rows.flatten().tolist()))}\n"}
    other = frozen(loaded("llama", folder, seed=1))
    assert not any(torch.equal(rows, other[name]) for name, rows in mine.items())


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "bert"])
def test_perturbed_losses_are_those_of_perturbed_adapters(name: str, tmp_path: Path) -> None:
    make, batched, chunked = MODELS[name]
    model = load(make, tmp_path).eval()
    kind = "classification" if "Sequence" in type(model).__name__ else "causal_lm"
    config_ = config("m", kind, trainable=adapters())
    wrapped: Any = add_adapters(model, config_.trainable.lora, config_, [])  # type: ignore[union-attr]
    replica = check(wrapped.eval(), 2e-6)
    heads = {spec.name for spec in replica.layout.specs if "lora_B" not in spec.name}
    assert len(heads) < len(replica.layout.specs) and (not heads or name == "bert")
    assert replica.verdict is not None
    assert (replica.verdict.batched, replica.verdict.chunked) == (batched, chunked), replica.verdict.reasons


def test_they_stream(tmp_path: Path) -> None:
    folder = make_model("gpt2", tmp_path)
    there = tmp_path / "there"
    there.mkdir()
    resident = Replica(loaded("gpt2", folder), 7)
    for streaming in (Streaming(), Streaming("nvme", there)):
        with streamed_loading(streaming):
            model = loaded("gpt2", folder)
        twin = Replica(copy.deepcopy(resident.model), 7)
        same(twin, Replica(model, 7, memory=partial(Streamed, streaming=streaming)))


def test_a_blank_model_trains_the_same_parameters(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path)
    assert trainable(blank_model(run("llama", folder))) == trainable(loaded("llama", folder))


def test_what_has_no_inputs_of_that_kind_is_refused(tmp_path: Path) -> None:
    run_ = run("gpt2", make_model("gpt2", tmp_path), trainable=adapters(target_modules=["wte"]))
    assert "wte" in refused(run_, ConfigError)
    with pytest.raises(ValidationError, match="Adapters begin as inputs"):
        config("m", trainable=adapters(), memory={"kind": "zero3", "shards": 2})


def test_rows_are_as_long_as_each_other() -> None:
    """One with an attention sink's inputs too; and rows that there is no token for are nothing."""
    inputs = torch.randn(4, 5, 32, dtype=torch.float64)
    inputs[2] *= 1000
    rows = scaled_rows(inputs, 4)
    assert torch.allclose(rows.square().sum(1), torch.full((4,), 8.0, dtype=torch.float64))
    sink = inputs[2, -1]
    assert torch.allclose(rows[2], sink * (8**0.5 / sink.norm()), atol=0.02)
    few = scaled_rows(torch.cat([inputs[0, :2], torch.zeros(1, 32, dtype=torch.float64)]), 4)
    assert few.shape == (4, 32) and not few[2:].any() and bool(few[:2].any(1).all())
