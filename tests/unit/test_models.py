"""Loading models: the same bits everywhere, what is trained, and what is said about a model that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.test_architectures import MODELS
from zoray.config import RunConfig
from zoray.errors import ConfigError, ModelError, ZorayError
from zoray.models import check_lengths, check_tokens, load_model, load_tokenizer, max_positions
from zoray.models.trainable import select
from zoray.tasks import load_task

DECODERS = ["gpt2", "opt", "llama", "qwen3", "gemma", "mistral", "mixtral"]


def config(model: Path | str, kind: str = "causal_lm", max_length: int = 16, **keys: Any) -> RunConfig:
    task = {"kind": kind, "train": "t", "max_length": max_length}
    return RunConfig.model_validate(
        {
            "model": str(model),
            "max_steps": 1,
            "task": task,
            "learning_rate": 1e-6,
            "optimizer": {"normalize": "none"},
            **keys,
        }
    )


def refused(run: RunConfig, kind: type[ZorayError] = ModelError, **labels: Any) -> str:
    with pytest.raises(kind) as caught:
        load_model(run, **labels)
    return str(caught.value)


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def logits(model: nn.Module, length: int = 8) -> torch.Tensor:
    ids = torch.arange(2 * length).reshape(2, length) % 40 + 6
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


# ---- what is loaded ----


@pytest.mark.parametrize("kind", DECODERS)
def test_causal_models(tmp_path: Path, tiny_model: Any, kind: str) -> None:
    import transformers

    folder = tiny_model(kind, tmp_path)
    model = load_model(config(folder))
    assert not model.training
    assert model.config.use_cache is False
    assert set(trainable(model)) == {name for name, _ in model.named_parameters()}
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "opt", "llama"])
def test_classifiers(tmp_path: Path, tiny_model: Any, kind: str) -> None:
    model = load_model(
        config(tiny_model(kind, tmp_path), "classification"), num_labels=3, id2label={0: "a", 1: "b", 2: "c"}
    )
    assert logits(model).shape == (2, 3)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert model.config.pad_token_id is not None


def test_names_of_a_trained_classifier_are_kept(tmp_path: Path, tiny_model: Any) -> None:
    folder = tiny_model("bert", tmp_path, head="classification", id2label={0: "no", 1: "yes"})
    model = load_model(config(folder, "classification"), num_labels=2)
    assert model.config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("what", ["full", {"lora": {"r": 2, "target_modules": "all-linear"}}])
def test_memory_is_aligned_contiguous_and_of_the_dtype(
    tmp_path: Path, tiny_model: Any, kind: str, dtype: str, what: Any
) -> None:
    task = "classification" if kind == "bert" else "causal_lm"
    model = load_model(config(tiny_model(kind, tmp_path), task, dtype=dtype, trainable=what), num_labels=2)
    addresses = set()
    for tensor in (*model.parameters(), *model.buffers()):
        assert tensor.data_ptr() % 64 == 0
        assert tensor.is_contiguous()
        assert tensor.storage_offset() == 0
        addresses.add(tensor.untyped_storage().data_ptr())
    assert len(addresses) == len([*model.parameters(), *model.buffers()])
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_tied_weights_stay_tied(tmp_path: Path, tiny_model: Any) -> None:
    model = load_model(config(tiny_model("gpt2", tmp_path)))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_parameters_over_one_memory_stay_one_weight() -> None:
    from zoray.models.load import _reallocate

    model = nn.Module()
    model.one = nn.Parameter(torch.arange(12.0).reshape(3, 4).t())
    model.two = nn.Parameter(torch.zeros(0))
    model.two.data = model.one.data
    model.three = nn.Parameter(model.one.detach().clone())
    _reallocate(model)
    assert model.one.data_ptr() == model.two.data_ptr() != model.three.data_ptr()
    assert model.one.is_contiguous()
    assert torch.equal(model.one, torch.arange(12.0).reshape(3, 4).t())


def test_weights_outlive_the_file(tmp_path: Path, tiny_model: Any) -> None:
    """No parameter is a view of the checkpoint's pages."""
    folder = tiny_model("gpt2", tmp_path)
    model = load_model(config(folder))
    before = logits(model)
    with open(folder / "model.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\x41" * size)
    assert torch.equal(logits(model), before)


# ---- new weights ----


@pytest.mark.parametrize("what", ["full", {"lora": {"r": 2, "target_modules": "all-linear"}}])
def test_new_weights_follow_from_the_seed_alone(tmp_path: Path, tiny_model: Any, what: Any) -> None:
    folder = tiny_model("bert", tmp_path)
    run = config(folder, "classification", trainable=what, seed=5)
    torch.manual_seed(1)
    one = load_model(run, num_labels=3).state_dict()
    torch.manual_seed(2)
    torch.rand(100)
    expected = torch.get_rng_state()
    two = load_model(run, num_labels=3).state_dict()
    assert torch.equal(torch.get_rng_state(), expected)
    other = load_model(config(folder, "classification", trainable=what, seed=6), num_labels=3).state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    drawn = [name for name in one if name.endswith(("classifier.weight", "lora_A.default.weight"))]
    assert drawn
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


def test_a_new_head_that_is_not_trained_is_warned_about(
    tmp_path: Path, tiny_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_model("bert", tmp_path)
    load_model(config(folder, "classification", trainable="attention"), num_labels=2)
    assert "classifier.weight" in caplog.text
    caplog.clear()
    load_model(config(folder, "classification", trainable="attention|classifier|pooler"), num_labels=2)
    assert caplog.text == ""


# ---- what is trained ----


def test_a_pattern_is_searched_for_in_names(tmp_path: Path, tiny_model: Any) -> None:
    model = load_model(config(tiny_model("gpt2", tmp_path), trainable=r"ln_\d\.bias$"))
    assert len(trainable(model)) == 4
    assert all(name.endswith(".bias") and ".ln_" in name for name in trainable(model))


def test_a_tied_weight_is_found_under_both_names(tmp_path: Path, tiny_model: Any) -> None:
    model = load_model(config(tiny_model("gpt2", tmp_path), trainable="lm_head"))
    assert trainable(model) == ["transformer.wte.weight"]


def test_a_pattern_that_matches_nothing(tmp_path: Path, tiny_model: Any) -> None:
    message = refused(config(tiny_model("gpt2", tmp_path), trainable="encoder"), ConfigError)
    assert "'encoder' matches none" in message
    assert "transformer.wte.weight" in message


BIASES_AND_NORMS = {
    "gpt2": ("attn.c_attn.bias", "ln_1.weight", "ln_f.bias"),
    "opt": ("self_attn.q_proj.bias", "self_attn_layer_norm.weight", "final_layer_norm.bias"),
    "llama": ("input_layernorm.weight", "model.norm.weight"),
    "qwen3": ("q_norm.weight", "post_attention_layernorm.weight"),
    "gemma": ("input_layernorm.weight",),
    "mixtral": ("input_layernorm.weight",),
}


@pytest.mark.parametrize("kind", BIASES_AND_NORMS)
def test_biases_and_norms_are_told_by_their_modules(tmp_path: Path, tiny_model: Any, kind: str) -> None:
    model = load_model(config(tiny_model(kind, tmp_path), trainable="bias_and_norm"))
    names = trainable(model)
    for ending in BIASES_AND_NORMS[kind]:
        assert any(name.endswith(ending) for name in names), ending
    for name, parameter in model.named_parameters():
        # These models have no other vectors.
        assert parameter.requires_grad == (parameter.dim() == 1), name


@pytest.mark.parametrize("name", ["t5", "bart", "bert", "gpt-oss", "falcon", "mpnet"])
def test_biases_and_norms_of_other_models(name: str) -> None:
    """A table of T5's or MPNet's is called a bias and is none; biases of experts are matrices."""
    model = MODELS[name][0]()
    select(model, "bias_and_norm")
    for each, parameter in model.named_parameters():
        bias = each.endswith("bias") and "relative_attention_bias" not in each
        norm = "norm" in each.lower() or ".ln_" in each
        assert parameter.requires_grad == (bias or norm), each


def test_a_new_head_is_trained_beside_biases_and_norms(tmp_path: Path, tiny_model: Any) -> None:
    names = trainable(load_model(config(tiny_model("gpt2", tmp_path), "classification", trainable="bias_and_norm")))
    assert "score.weight" in names and "transformer.h.0.attn.c_attn.weight" not in names
    sparse = {"sparse": {"parameters": "bias_and_norm"}}
    assert trainable(load_model(config(tmp_path / "gpt2", "classification", trainable=sparse))) == names
    blocks = {"blocks": {"count": 2, "parameters": "c_attn"}}
    assert all("c_attn" in name for name in trainable(load_model(config(tmp_path / "gpt2", trainable=blocks))))
    message = refused(config(tmp_path / "gpt2", trainable={"blocks": {"count": 2, "parameters": "no"}}), ConfigError)
    assert "trainable.blocks.parameters" in message


def test_a_model_without_biases_and_norms() -> None:
    with pytest.raises(ConfigError, match="neither biases nor norms"):
        select(nn.Sequential(nn.Linear(2, 2, bias=False)), "bias_and_norm")


@pytest.mark.parametrize(("kind", "modules"), [("gpt2", ["c_attn"]), ("llama", ["q_proj", "v_proj"]), ("opt", None)])
def test_lora(tmp_path: Path, tiny_model: Any, kind: str, modules: list[str] | None) -> None:
    folder = tiny_model(kind, tmp_path)
    lora = {"r": 2, "lora_alpha": 4, "target_modules": modules}
    model = load_model(config(folder, trainable={"lora": lora}))
    assert trainable(model)
    assert all(".lora_" in name for name in trainable(model))
    assert all(parameter.shape[0] == 2 for name, parameter in model.named_parameters() if ".lora_A." in name)
    assert not model.training
    # B starts at 0: the adapted model is the model.
    assert torch.equal(logits(model), logits(load_model(config(folder))))


@pytest.mark.parametrize(
    ("kind", "heads"),
    [("bert", {"classifier", "pooler"}), ("roberta", {"classifier"}), ("gpt2", {"score"}), ("llama", {"score"})],
)
def test_a_new_head_is_trained_beside_the_adapters(
    tmp_path: Path, tiny_model: Any, kind: str, heads: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = config(tiny_model(kind, tmp_path), "classification", trainable={"lora": {"r": 2}})
    model = load_model(run, num_labels=3)
    copies = [name for name in trainable(model) if ".modules_to_save." in name]
    assert {head for head in heads if any(f".{head}." in name for name in copies)} == heads
    assert all(any(f".{head}." in name for head in heads) for name in copies)
    assert len(trainable(model)) > len(copies)
    assert logits(model).shape == (2, 3)
    assert caplog.text == ""


def test_lora_modules_that_do_not_exist(tmp_path: Path, tiny_model: Any) -> None:
    run = config(tiny_model("gpt2", tmp_path), trainable={"lora": {"target_modules": ["q_proj"]}})
    message = refused(run, ConfigError)
    assert "q_proj" in message
    assert "transformer.wte" in message


# ---- models that cannot be used ----


def test_missing_models(tmp_path: Path) -> None:
    assert f"There is no folder {tmp_path}/no" in refused(config(tmp_path / "no"))
    assert "There is no folder" in refused(config("./no"))
    assert "There is no folder" in refused(config("a/b/c"))
    message = refused(config("no-such/model"))
    assert "neither a folder nor a model on the Hugging Face hub" in message
    assert "neither a folder" in refused(config("not a name!"))
    with pytest.raises(ModelError, match="neither a folder"):
        load_tokenizer(config("no-such/model"))


def test_a_cached_hub_model_is_loaded_without_network(
    tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    snapshot = cache / "models--some--model" / "snapshots" / "0123abcd"
    shutil.copytree(tiny_model("gpt2", tmp_path), snapshot)
    (cache / "models--some--model" / "refs").mkdir()
    (cache / "models--some--model" / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(cache), raising=False)
    assert logits(load_model(config("some/model"))).shape == (2, 8, 128)


def test_folders_without_a_model(tmp_path: Path, tiny_model: Any) -> None:
    (tmp_path / "empty").mkdir()
    assert "no config.json; it has nothing" in refused(config(tmp_path / "empty"))
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "config.json").write_text("{}")
    # Nobody can read what a link to nowhere names, not even root, as whom tests may run.
    (tmp_path / "closed" / "model.safetensors").symlink_to(tmp_path / "nowhere")
    assert "cannot read model.safetensors in the folder" in refused(config(tmp_path / "closed"))
    (tmp_path / "empty" / "adapter_config.json").touch()
    assert "merge it" in refused(config(tmp_path / "empty"))
    folder = tiny_model("gpt2", tmp_path)
    assert "is a file" in refused(config(folder / "config.json"))
    (folder / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refused(config(folder))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "valid JSON"),
        ("{}", "model_type"),
        ('{"model_type": "xyz"}', "model type `xyz`"),
        (
            '{"model_type": "xyz", "auto_map": {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"}}',
            "trust_remote_code: true",
        ),
    ],
)
def test_broken_config_json(tmp_path: Path, tiny_model: Any, text: str, words: str) -> None:
    folder = tiny_model("gpt2", tmp_path)
    (folder / "config.json").write_text(text)
    assert words in refused(config(folder))


def test_corrupt_weights(tmp_path: Path, tiny_model: Any) -> None:
    folder = tiny_model("gpt2", tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    for damaged in (data[:-10], data[:4], b"", data[:8] + b"x" + data[9:]):
        (folder / "model.safetensors").write_bytes(damaged)
        message = refused(config(folder))
        assert "A weight file is damaged" in message
        assert "download the model again" in message


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_a_checkpoint_without_some_weights(tmp_path: Path, tiny_model: Any, task: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_model("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "no weights for model.layers.0.mlp.down_proj.weight" in refused(config(folder, task), num_labels=2)


@pytest.mark.parametrize(("kind", "task"), [("t5", "causal_lm"), ("vit", "causal_lm"), ("vit", "classification")])
def test_a_model_of_another_kind(tmp_path: Path, tiny_model: Any, kind: str, task: str) -> None:
    message = refused(config(tiny_model(kind, tmp_path), task), num_labels=2)
    assert f"is of type {kind}, which cannot be loaded as" in message


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_bidirectional_model_is_no_causal_model(tmp_path: Path, tiny_model: Any, kind: str) -> None:
    assert "bidirectional" in refused(config(tiny_model(kind, tmp_path)))


def test_a_bert_made_a_decoder_is_a_causal_model(tmp_path: Path, tiny_model: Any) -> None:
    folder = tiny_model("bert", tmp_path, head="causal_lm", is_decoder=True)
    assert logits(load_model(config(folder))).shape == (2, 8, 128)


def test_a_classifier_of_another_number_of_classes(tmp_path: Path, tiny_model: Any) -> None:
    folder = tiny_model("bert", tmp_path, head="classification", num_labels=4)
    message = refused(config(folder, "classification"), num_labels=3)
    assert "3 labels" in message
    assert "task.num_labels" in message


def test_attention_that_does_not_exist(tmp_path: Path, tiny_model: Any) -> None:
    folder = tiny_model("llama", tmp_path)
    message = refused(config(folder, attn_implementation="nope"))
    assert "attn_implementation nope" in message
    model = load_model(config(folder, attn_implementation="eager"))
    assert model.config._attn_implementation == "eager"


def test_loading_is_silent(tmp_path: Path, tiny_model: Any, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model("bert", tmp_path)
    run = config(folder, "classification", trainable={"lora": {"r": 2}})
    capfd.readouterr()
    load_tokenizer(run)
    load_model(run, num_labels=3)
    assert capfd.readouterr() == ("", "")


# ---- tokenizers and limits ----


def test_tokenizer(tmp_path: Path, tiny_model: Any) -> None:
    tokenizer = load_tokenizer(config(tiny_model("gpt2", tmp_path)))
    assert tokenizer("a film")["input_ids"] == tokenizer.convert_tokens_to_ids(["a", "film"])
    with pytest.raises(ModelError, match=r"tokenizer of .* cannot be loaded"):
        load_tokenizer(config(tiny_model("vit", tmp_path)))


@pytest.mark.parametrize(("kind", "task"), [("gpt2", "causal_lm"), ("opt", "causal_lm"), ("roberta", "classification")])
def test_the_limit_is_the_longest_sequence_that_runs(tmp_path: Path, tiny_model: Any, kind: str, task: str) -> None:
    run = config(tiny_model(kind, tmp_path), task, max_length=65)
    model = load_model(run, num_labels=2)
    assert max_positions(model) == 64
    logits(model, 64)
    with pytest.raises((IndexError, RuntimeError)):
        logits(model, 65)
    with pytest.raises(ConfigError, match=r"task.max_length is 65, but .* takes at most 64"):
        check_lengths(run, model)
    check_lengths(config(run.model, task, max_length=64), model)


def test_limits_of_other_models(tmp_path: Path, tiny_model: Any) -> None:
    assert max_positions(load_model(config(tiny_model("llama", tmp_path)))) == 64
    t5 = load_model(config(tiny_model("t5", tmp_path), "classification"), num_labels=2)
    assert max_positions(t5) is None
    check_lengths(config("t5", max_length=10**6), t5)
    lora = config(tmp_path / "llama", trainable={"lora": {"r": 1}})
    assert max_positions(load_model(lora)) == 64


def test_a_tokenizer_of_another_model(tmp_path: Path, tiny_model: Any) -> None:
    folder = tiny_model("gpt2", tmp_path, vocab_size=30)
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps({"text": "weights with wire the quick brown fox"}) + "\n")
    task = {"kind": "causal_lm", "train": str(data), "max_length": 4}
    run = RunConfig.model_validate({"model": str(folder), "max_steps": 1, "task": task})
    loaded = load_task(run, load_tokenizer(run))
    with pytest.raises(ModelError, match="embeddings for 30 tokens"):
        check_tokens(loaded, load_model(run))
    check_tokens(loaded, load_model(config(tiny_model("llama", tmp_path))))


def test_a_padded_batch_of_a_decoder_classifies_as_its_rows_do(tmp_path: Path, tiny_model: Any) -> None:
    """The padding token was chosen, and the classifier looks at the last token before it."""
    folder = tiny_model("gpt2", tmp_path)
    data = tmp_path / "a.jsonl"
    rows = [{"text": "the quick brown fox jumps", "label": 0}, {"text": "a film", "label": 1}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": "classification", "train": str(data), "max_length": 16}
    run = RunConfig.model_validate({"model": str(folder), "max_steps": 1, "task": task})
    loaded = load_task(run, load_tokenizer(run))
    model = load_model(run, num_labels=loaded.num_labels)
    batch = loaded.batch([0, 1])
    with torch.no_grad():
        together = model(**batch).logits
        alone = [
            model(input_ids=load_tokenizer(run)(row["text"], return_tensors="pt")["input_ids"]).logits for row in rows
        ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
