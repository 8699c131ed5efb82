"""`zoray export`: a folder that from_pretrained loads, with the replica's weights bit for bit."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launch.export import export
from tests.unit.run_builder import BuiltRun, build_run, weights
from zoray.errors import RunError

LORA = {"lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}


def same_bits(found: nn.Module, expected: nn.Module) -> None:
    """Equal names, dtypes and bits of all weights."""
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuiltRun:
    return build_run(tmp_path_factory.mktemp("export"), max_steps=3)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> BuiltRun:
    return build_run(tmp_path_factory.mktemp("lora"), "llama", trainable=LORA, learning_rate=10.0, max_steps=2)


@pytest.mark.parametrize(
    ("model", "kind", "dtype"),
    [
        ("gpt2", "causal_lm", "float32"),
        ("llama", "causal_lm", "bfloat16"),
        ("bert", "classification", "float16"),
    ],
)
def test_the_weights_are_the_replicas(tmp_path: Path, model: str, kind: str, dtype: str) -> None:
    import transformers

    run = build_run(tmp_path, model, kind, dtype=dtype, max_steps=2, learning_rate=1.0)
    assert run.digests[2] != run.digests[0]
    export("tiny", tmp_path / "out", None, False, run.output_dir)
    auto: Any = (
        transformers.AutoModelForCausalLM if kind == "causal_lm" else transformers.AutoModelForSequenceClassification
    )
    loaded = auto.from_pretrained(tmp_path / "out")
    assert loaded.dtype == getattr(torch, dtype)
    same_bits(loaded, run.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    base = transformers.AutoTokenizer.from_pretrained(run.config.model)
    text = "the ledger is the run"
    assert tokenizer(text)["input_ids"] == base(text)["input_ids"]
    assert not leftovers(tmp_path)
    if kind == "classification":
        assert loaded.config.id2label == {0: "bad", 1: "good"}
    else:
        # Training has no use for the cache of keys and values; who generates has.
        assert loaded.generation_config.use_cache and getattr(loaded.config, "use_cache", True)


def test_an_earlier_step(
    built: BuiltRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.chdir(tmp_path)
    export("tiny", Path("deep/er"), 0, False, built.output_dir)
    assert capsys.readouterr().out == f"model of step 0, digest {built.digests[0]:016x}: deep/er\n"
    base = transformers.AutoModelForCausalLM.from_pretrained(built.config.model)
    same_bits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "er"), base)
    export("tiny", Path("two"), 2, False, built.output_dir)
    assert f"{built.digests[2]:016x}" in capsys.readouterr().out


def test_adapters_of_inputs_are_merged(tmp_path: Path) -> None:
    import transformers

    keys: dict[str, Any] = {"trainable": {"lora": {**LORA["lora"], "init_lora_weights": "activations"}}}
    run = build_run(tmp_path, "llama", **keys, learning_rate=10.0, max_steps=2)
    export("tiny", tmp_path / "out", None, False, run.output_dir)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(run.config.model)
    merged: Any = copy.deepcopy(run.model)
    same_bits(loaded, merged.merge_and_unload())
    assert any(not torch.equal(tensor, weights(base)[name]) for name, tensor in weights(loaded).items())


def test_lora_is_merged(lora: BuiltRun, tmp_path: Path) -> None:
    import transformers

    export("tiny", tmp_path / "out", None, False, lora.output_dir)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(lora.config.model)
    merged: Any = copy.deepcopy(lora.model)
    same_bits(loaded, merged.merge_and_unload())
    changed = {name for name, tensor in weights(loaded).items() if not torch.equal(tensor, weights(base)[name])}
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)


def test_lora_as_an_adapter(lora: BuiltRun, tmp_path: Path) -> None:
    import peft
    import transformers

    export("tiny", tmp_path / "out", None, True, lora.output_dir)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == lora.config.model
    base = transformers.AutoModelForCausalLM.from_pretrained(lora.config.model)
    same_bits(peft.PeftModel.from_pretrained(base, tmp_path / "out"), lora.model)


@pytest.mark.parametrize(
    ("model", "kind", "dtype"),
    [("llama", "causal_lm", "bfloat16"), ("gpt2", "causal_lm", "float32"), ("bert", "classification", "float32")],
)
@pytest.mark.parametrize("adapter", [True, False])
def test_a_prefix_is_an_adapter(tmp_path: Path, model: str, kind: str, dtype: str, adapter: bool) -> None:
    import peft
    import transformers

    keys: dict[str, Any] = {"dtype": dtype, "trainable": {"prefix": {"num_virtual_tokens": 3}}, "learning_rate": 1.0}
    run = build_run(tmp_path, model, kind, max_steps=2, epsilon=0.1, **keys)
    assert run.digests[2] != run.digests[0]
    export("tiny", tmp_path / "out", None, adapter, run.output_dir)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    auto: Any = transformers.AutoModelForCausalLM
    auto = auto if kind == "causal_lm" else transformers.AutoModelForSequenceClassification
    base = auto.from_pretrained(run.config.model, dtype=getattr(torch, dtype))
    found: Any = peft.PeftModel.from_pretrained(base, tmp_path / "out", autocast_adapter_dtype=False).eval()
    learnt = run.model.get_parameter("prompt_encoder.default.embedding.weight")
    assert torch.equal(found.get_parameter("prompt_encoder.default.embedding.weight"), learnt)
    ids = torch.tensor([[6, 7, 8, 9]])
    with torch.no_grad():
        expected = run.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.equal(found(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, expected)


def test_an_adapter_of_a_run_without_one(built: BuiltRun, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no adapter"):
        export("tiny", tmp_path / "out", None, True, built.output_dir)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_is_there_already_stays(built: BuiltRun, tmp_path: Path, what: str) -> None:
    target = tmp_path / "out"
    keep = target / "keep" if what == "folder" else target
    keep.parent.mkdir(exist_ok=True)
    keep.write_text("mine")
    with pytest.raises(RunError, match="not an empty folder"):
        export("tiny", target, None, False, built.output_dir)
    assert keep.read_text() == "mine"


@pytest.mark.parametrize("where", ["folder", "link", "here"])
def test_an_empty_folder_is_filled(
    built: BuiltRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    monkeypatch.chdir(target if where == "here" else tmp_path)
    (tmp_path / "link").symlink_to(target)
    export("tiny", {"folder": target, "link": tmp_path / "link", "here": Path()}[where], 0, False, built.output_dir)
    assert (target / "model.safetensors").exists() and (tmp_path / "link").is_symlink()


def test_a_failure_leaves_nothing_behind(built: BuiltRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def full(self: Any, folder: Path, **arguments: Any) -> None:
        save(self, folder, **arguments)
        raise SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(RunError, match="No space left"):
        export("tiny", tmp_path / "out", 0, False, built.output_dir)
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


def test_a_model_with_its_own_code_is_asked_for_with_trust(
    built: BuiltRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    asked = []
    original = transformers.AutoConfig.from_pretrained

    def watched(*arguments: Any, **options: Any) -> Any:
        asked.append(options.get("trust_remote_code"))
        return original(*arguments, **options)

    folder = Path(shutil.copytree(built.folder.path, tmp_path / "runs" / "tiny"))
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", watched)
    export("tiny", tmp_path / "out", 0, False, str(folder.parent))
    assert asked and all(asked)
