"""Factors that are mixed from inputs: which inputs, the same everywhere, and as large as signs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.conftest import SENTENCES, VOCABULARY, make_model, make_tokenizer
from tests.unit.helpers import commit_of, printed_elsewhere
from tests.unit.test_models import config
from zoray.errors import ConfigError, ModelError
from zoray.exact import in_float64
from zoray.inputs import LARGEST_MIXED, POOL, Mixture, find, find_mixtures, input_sides, random_texts
from zoray.inputs.find import _one_of_each
from zoray.layout import BLOCK_BYTES
from zoray.models import load_model
from zoray.replica import Replica
from zoray.tasks import load_task


def loaded(folder: Path, **keys: Any) -> Any:
    return load_model(config(folder, **keys))


def classifier(folder: Path, **keys: Any) -> Any:
    return load_model(config(folder, "classification", **keys), num_labels=3)


def signs(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).integers(0, 2, shape) * 2 - 1).astype(np.int8)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "gemma"])
def test_they_are_the_inputs_of_random_texts(kind: str, tmp_path: Path) -> None:
    """Of the last tokens, each by itself in proportion, but for rounding and what is far above the others."""
    model = loaded(make_model(kind, tmp_path))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts, seen = random_texts(model, 3), dict[str, torch.Tensor]()
    found = find_mixtures(model, texts, 3)
    assert set(found) == set(input_sides(model)) and found
    for name in found:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        model(**texts)
    for name, mixture in found.items():
        rows = seen[name].view(POOL, -1, seen[name].shape[-1])[:, -1].double().numpy()
        expected = np.clip(rows * (1.6 / np.abs(rows).mean(1, keepdims=True)), -7, 7)
        assert np.abs(mixture.values - expected).max() < 0.6, name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.dtype == before[name].dtype for name, value in model.state_dict().items())


def test_every_process_finds_the_same(tmp_path: Path) -> None:
    """Also with other numbers of threads and another kernel for attention, whose float32 sums have other bits."""
    folder = make_model("llama", tmp_path, hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "from pathlib import Path\n"
        "from tests.unit.test_inputs import loaded\n"
        "from zoray.replica import Replica\n"
        "model = loaded(Path(sys.argv[1]), attn_implementation=sys.argv[2])\n"
        "print(Replica(model, 5, direction='inputs').directions.identity)\n"
    )
    mine = Replica(loaded(folder), 5, direction="inputs").directions.identity
    assert printed_elsewhere(code, folder) == {f"{mine}\n"}
    assert Replica(loaded(folder), 6, direction="inputs").directions.identity != mine


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "gemma", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_of_it_is_computed_in_float64(
    kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the last bits would be those of this machine's kernels, and now and then an integer another one."""
    seen: list[torch.Tensor] = []

    def noted(inputs: torch.Tensor, mask: torch.Tensor | None) -> np.ndarray:
        seen.append(inputs.clone())
        return _one_of_each(inputs, mask)

    monkeypatch.setattr(find, "_one_of_each", noted)
    model = loaded(make_model(kind, tmp_path), dtype=dtype)
    # Experts in one tensor are not widened whole where they are large.
    monkeypatch.setattr("zoray.exact._LARGE", 100)
    texts = random_texts(model, 0)
    found = find_mixtures(model, texts, 0)
    assert len(seen) == len(found) > 0
    assert all(parameter.dtype == getattr(torch, dtype) for parameter in model.parameters())
    mine, seen[:] = list(seen), []
    with in_float64(model):
        find_mixtures(model.double(), texts, 0)
    for one, other in zip(mine, seen, strict=True):
        assert one.dtype == torch.float64 and torch.allclose(one, other, rtol=1e-11, atol=1e-11)


def test_attention_without_a_kernel_for_float64_is_another_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, chosen = loaded(make_model("llama", tmp_path)), list[str]()
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: chosen.append(name))
    with in_float64(model):
        assert chosen == ["sdpa"]
    assert chosen == ["sdpa", "flash_attention_2"]


def test_any_seed_has_texts_of_its_own(tmp_path: Path) -> None:
    model = loaded(make_model("gpt2", tmp_path))
    texts = [random_texts(model, seed)["input_ids"] for seed in (0, 1, 2**63, 2**63 + 1, 2**64 - 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(texts) for b in texts[:i])


def test_an_interrupt_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = loaded(make_model("llama", tmp_path))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[0].post_attention_layernorm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        find_mixtures(model, random_texts(model, 0), 0)
    hook.remove()
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_step_is_as_long_as_one_of_signs() -> None:
    """Inputs that have much in common are moved along by each other: the loss must not bend within epsilon for that."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(torch.randn(256) * 0.02)
    ids = torch.randint(0, 300, (3, 16))
    batch = {"input_ids": ids, "labels": ids}
    errors = {}
    for direction in ("rank", "inputs"):
        one, two = (Replica(model, 1, direction=direction, estimator=name) for name in ("backprop", "spsa"))  # type: ignore[arg-type]
        exact, found = (
            np.array([each.probe(0, k, batch, 1e-3).projected_gradient for k in range(12)]) for each in (one, two)
        )
        errors[direction] = float(np.square(found - exact).mean() / np.square(exact).mean()) ** 0.5
    mixtures = Replica(model, 1, direction="inputs").directions.inputs.values()
    assert max(mixture.strain for mixture in mixtures) > 20
    assert errors["inputs"] < 2 * errors["rank"] < 0.1, errors


def test_other_weights_are_another_set_of_directions(tmp_path: Path) -> None:
    """A replica that began elsewhere would move the weights otherwise, and must not be let in."""
    model, other = (loaded(make_model("gpt2", tmp_path / name)) for name in "ab")
    with torch.no_grad():
        other.transformer.h[0].ln_1.bias.add_(0.5)
    first, second = (Replica(each, 5, direction="inputs") for each in (model, other))
    assert first.layout == second.layout and first.directions.identity != second.directions.identity


def test_which_weights_have_inputs(tmp_path: Path) -> None:
    """Not tied heads, adapters or what is frozen."""
    gpt2 = input_sides(loaded(make_model("gpt2", tmp_path / "a")))
    assert {name.rpartition("h.0.")[2]: side for name, side in gpt2.items() if ".h.0." in name} == dict.fromkeys(
        ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"), "rows"
    )
    assert not any("wte" in name or "lm_head" in name for name in gpt2)
    untied = make_model("llama", tmp_path / "b", tie_word_embeddings=False)
    assert input_sides(loaded(untied))["lm_head.weight"] == "cols"
    assert set(input_sides(loaded(untied, trainable="q_proj"))) == {
        name for name in input_sides(loaded(untied)) if "q_proj" in name
    }
    assert input_sides(loaded(untied, trainable={"lora": {"r": 16, "target_modules": "all-linear"}})) == {}


def test_no_more_of_a_forward_is_computed_than_is_needed(tmp_path: Path) -> None:
    """A head's logits are the widest tensor there is, and its inputs are known before them."""
    model = loaded(make_model("llama", tmp_path, tie_word_embeddings=False))
    called: list[str] = []
    for name in ("lm_head", "model.layers.0.mlp.down_proj"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    assert "lm_head.weight" in find_mixtures(model, random_texts(model, 0), 0)
    assert called == ["model.layers.0.mlp.down_proj"]
    assert not any(module._forward_pre_hooks for module in model.modules())
    called.clear()
    # One of a layer that is never called does not make a head be called either.
    model.unused = nn.Linear(32, 32)
    assert set(find_mixtures(model, random_texts(model, 0), 0)) >= {"unused.weight", "lm_head.weight"}
    assert set(find_mixtures(model, random_texts(model, 0), 0, ["unused.weight"])) == {"unused.weight"}
    assert called == ["model.layers.0.mlp.down_proj"] * 2


def test_embeddings_are_looked_up_as_they_are(tmp_path: Path) -> None:
    """A table of them may be half a model; widened whole, it would not fit where the model does."""
    model = loaded(make_model("gpt2", tmp_path))
    wte, seen = model.transformer.wte, list[torch.dtype]()
    wte.register_forward_pre_hook(lambda module, _: seen.append(module.weight.dtype))
    texts = random_texts(model, 0)
    with torch.no_grad(), in_float64(model):
        logits = model(**texts).logits
    assert logits.dtype == torch.float64 and seen == [torch.float32]
    with torch.no_grad():
        expected = model.double()(**texts).logits
    assert torch.allclose(logits, expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "roberta"])
def test_of_what_a_classifier_s_layers_are_given_the_mean_is_taken_off(kind: str, tmp_path: Path) -> None:
    """Whichever of them are trained; a language model's are as they are."""
    folder = make_model(kind, tmp_path)
    model, seen = classifier(folder), dict[str, np.ndarray]()
    for name in input_sides(model):
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: _one_of_each(args[0])}))
    texts = random_texts(model, 3)
    found = find_mixtures(model, texts, 3)
    with torch.no_grad():
        model(**texts)
    assert set(found) == set(seen) and found
    for name, mixture in found.items():
        rows = np.clip(seen[name] * (1.6 / np.abs(seen[name]).mean(1, keepdims=True)), -7, 7)
        rows -= rows.mean(0)
        rows *= 1.6 / np.abs(rows).mean(1, keepdims=True)
        # Both scales are rounded to a few bits.
        assert np.abs(mixture.values - np.clip(rows, -7, 7)).max() < 1, name
    some = find_mixtures(classifier(folder, trainable="query|c_attn"), texts, 3)
    assert some and all(np.array_equal(mixture.values, found[name].values) for name, mixture in some.items())


def test_inputs_that_are_all_the_same_have_nothing_but_their_mean() -> None:
    """What is left are last bits of sums."""
    same = np.tile(np.random.default_rng(0).standard_normal(40), (POOL, 1))
    assert set(np.unique(Mixture.of(same, signs((POOL, 40)), centred=True).values)) == {-2, 2}
    assert len(np.unique(Mixture.of(same, signs((POOL, 40))).values)) > 3


@settings(max_examples=20)
@given(padding=st.integers(1, 5), left=st.booleans())
def test_padding_is_no_input(padding: int, left: bool) -> None:
    inputs, mask = torch.randn(POOL, 6, 20), torch.ones(POOL, 6, dtype=torch.long)
    inputs[:, :padding] = 9.0
    mask[:, :padding] = 0
    if not left:
        inputs, mask = inputs.flip(1), mask.flip(1)
    expected = inputs[:, -1 if left else -1 - padding].double().numpy()
    np.testing.assert_array_equal(_one_of_each(inputs, mask), expected)
    # Rows that are not those of the texts' tokens are taken as they come.
    np.testing.assert_array_equal(_one_of_each(inputs[:, :3], mask), inputs[:, 2].double().numpy())


class Picky(nn.Module):
    """One layer is given three tokens, one none, and one nothing but zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.some, self.none, self.zeros = (nn.Linear(40, 30) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.some(x[:3]).sum() + self.zeros(x * 0).sum()
        return made


def test_layers_that_are_given_little_have_signs_instead() -> None:
    found = find_mixtures(Picky(), {"x": torch.randn(POOL, 40)}, 3)
    assert set(found) == {"some.weight", "none.weight", "zeros.weight"}
    assert len(np.unique(found["some.weight"].values[:3])) > 5
    for values in (found["some.weight"].values[3:], found["none.weight"].values, found["zeros.weight"].values):
        assert set(np.unique(values)) == {-2, 2} and abs(values.mean()) < 0.2
    assert not np.array_equal(found["none.weight"].values, found["zeros.weight"].values)


def test_a_model_without_tokens_needs_texts_of_its_own() -> None:
    with pytest.raises(ConfigError, match="how many tokens") as caught:
        Replica(Picky(), direction="inputs")
    assert "texts" in (caught.value.advice or "")
    replica = Replica(Picky(), direction="inputs", texts={"x": torch.randn(POOL, 40)})
    assert len(replica.directions.inputs) == 3


@settings(max_examples=40)
@given(
    features=st.integers(1, 300),
    size=st.sampled_from([1e-30, 1.0, 1e20]),
    outlier=st.sampled_from([1.0, 1e6]),
    count=st.integers(0, POOL),
    seed=st.integers(0, 9),
)
def test_factors_are_what_their_bytes_say_and_fit(
    features: int, size: float, outlier: float, count: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((count, features)) * size
    inputs[:, :1] *= outlier
    mixture = Mixture.of(inputs, signs((POOL, features)))
    assert int(np.abs(mixture.values).max()) <= 7
    packed = generator.integers(0, 256, (5, 2, BLOCK_BYTES + -(-features // 8)), dtype=np.uint8)
    found = mixture.mix(packed)
    assert found.dtype == np.int8 and found.shape == (5, 2, features)
    for index in np.ndindex(5, 2):
        expected = np.zeros(features, int)
        for term, byte in enumerate(packed[index][:16].tolist()):
            expected += (1 - 2 * (byte & 1)) * mixture.values[4 * term + (byte >> 1) % 4]
        bits = np.unpackbits(packed[index][BLOCK_BYTES:], bitorder="little")[:features].astype(int)
        np.testing.assert_array_equal(found[index], expected + 8 - 16 * bits)
        assert np.abs(expected + 8 - 16 * bits).max() <= LARGEST_MIXED


def test_factors_are_as_large_as_signs() -> None:
    generator = np.random.default_rng(0)
    mixture = Mixture.of(generator.standard_normal((POOL, 200)) * generator.exponential(1, 200), signs((POOL, 200)))
    packed = generator.integers(0, 256, (4000, BLOCK_BYTES + 32), dtype=np.uint8)
    squares = np.square(mixture.mix(packed).astype(np.float64) * mixture.scale)
    assert squares.mean() == pytest.approx(1, abs=0.02)


def test_steps_that_learn_from_inputs_are_steps(tmp_path: Path) -> None:
    """What a commit does to the weights is what the probes perturbed them by."""
    replica = Replica(loaded(make_model("gpt2", tmp_path)), 5, direction="inputs")
    before = {name: value.detach().clone() for name, value in replica.model.named_parameters()}
    replica.apply(commit_of(0, [100, -7], eta=2.0**-10))
    mixed = 0
    for spec in replica.layout.specs:
        z = [replica.directions.dense((0, k), spec) for k in (0, 1)]
        moved = replica.model.get_parameter(spec.name).detach() - before[spec.name]
        assert torch.allclose(moved, -(2.0**-10) * (100 * z[0] - 7 * z[1]), atol=1e-5), spec.name
        mixed += spec.mixed is not None
    assert mixed == len(replica.directions.inputs) > 0


def test_a_model_that_takes_other_arguments_says_so(tmp_path: Path) -> None:
    model = loaded(make_model("gpt2", tmp_path))
    with pytest.raises(ModelError, match="cannot be run on texts of pixels") as caught:
        Replica(model, direction="inputs", texts={"pixels": torch.zeros(POOL, 3)})
    assert "direction: {kind: rank}" in (caught.value.advice or "")
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("words", [3, 40])
def test_a_classifier_begins_with_its_own_texts(kind: str, words: int, tmp_path: Path) -> None:
    """Longer and shorter than is taken of them; those of an encoder-decoder need an end, and are cut off before it."""
    import transformers

    folder = make_model(kind, tmp_path, head="classification") if kind != "bart" else small_bart(tmp_path)
    rows = [{"text": " ".join(SENTENCES[i % 7].split()[:words] * (1 + words // 10)), "label": i % 2} for i in range(20)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config(folder, "classification", max_length=48)
    settings = settings.model_copy(update={"task": settings.task.model_copy(update={"train": str(data)})})
    task = load_task(settings, transformers.AutoTokenizer.from_pretrained(folder))
    texts = task.texts(3)
    assert texts is not None and "labels" not in texts
    assert texts["input_ids"].shape[0] == POOL and texts["input_ids"].shape[1] <= 16
    lengths = texts["attention_mask"].sum(1)
    assert bool((lengths == 16).all()) if words == 40 else bool((lengths < 16).all())
    model = load_model(settings, num_labels=2)
    found = find_mixtures(model, texts, 3)
    assert set(found) == set(input_sides(model))
    assert len(np.unique(next(iter(found.values())).values, axis=0)) > 3


def small_bart(folder: Path) -> Path:
    """BART's classifier, which wants as many ends in every text."""
    import transformers

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    tokens = {"vocab_size": VOCABULARY, "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": 3}
    tokens |= {"decoder_start_token_id": 0, "num_labels": 2}
    torch.manual_seed(0)
    model = transformers.BartForSequenceClassification(transformers.BartConfig(**sizes, **heads, **tokens))
    model.save_pretrained(folder / "bart")
    make_tokenizer("t5").save_pretrained(folder / "bart")
    return folder / "bart"
