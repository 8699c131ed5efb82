"""Any Hugging Face model: perturbed losses equal those of a copy whose weights were really perturbed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from tests.unit.helpers import really_perturbed
from zoray.errors import ModelError
from zoray.inputs import POOL
from zoray.replica import Replica
from zoray.selection import Rotation, Selection, SmallWeights

TEXT = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZE, "num_key_value_heads": 2}
HEAD = {**GROUPED, "head_dim": 8}
EPSILON = 1e-2


def gpt2() -> Any:
    config = hf.GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=64, **TEXT)
    return hf.GPT2LMHeadModel(config)


def opt() -> Any:
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=64, **TEXT))


def t5() -> Any:
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0, **TEXT))


def bart() -> Any:
    both = {"layers": 1, "ffn_dim": 64, "attention_heads": 4}
    sizes = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in both.items()}
    return hf.BartForConditionalGeneration(hf.BartConfig(d_model=32, **sizes, decoder_start_token_id=2, **TEXT))


def t5_classifier() -> Any:
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    words = {**TEXT, "eos_token_id": 1, "bos_token_id": None}
    return hf.T5ForSequenceClassification(hf.T5Config(**sizes, decoder_start_token_id=0, num_labels=3, **words))


def mpnet() -> Any:
    return hf.MPNetForSequenceClassification(hf.MPNetConfig(**SIZE, num_labels=3, **TEXT))


def bert() -> Any:
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZE, num_labels=3, **TEXT))


class Nano(nn.Module):
    """A language model after nanoGPT: positions are looked up by (T,) indices, and weigh `factor`."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.words, self.places = nn.Embedding(97, 32), nn.Embedding(64, 32)
        self.norm, self.mix, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.head = nn.Linear(32, 97, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        x = self.words(input_ids) + self.factor * self.places(torch.arange(input_ids.shape[1]))
        queries, keys, values = self.mix(self.norm(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True))
        logits = self.head(x)
        if labels is None:
            return logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return hf.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def vit() -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(**SIZE, image_size=16, patch_size=4, num_labels=3))


MODELS: dict[str, tuple[Callable[[], Any], bool, bool]] = {
    # name: (make, both signs in one forward, head in slices)
    "gpt2": (gpt2, True, True),
    "opt": (opt, True, True),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, **TEXT)), True, True),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**HEAD, **TEXT)), True, True),
    "gemma": (lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**HEAD, **TEXT)), True, True),
    "gemma2": (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**HEAD, **TEXT)), True, False),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, **TEXT)), True, True),
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4, **TEXT)), True, True),
    "bloom": (lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **TEXT)), True, True),
    "falcon": (
        lambda: hf.FalconForCausalLM(
            hf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **TEXT)
        ),
        True,
        True,
    ),
    "gpt-oss": (
        lambda: hf.GptOssForCausalLM(
            hf.GptOssConfig(**{**HEAD, "intermediate_size": 32}, num_local_experts=4, num_experts_per_tok=2, **TEXT)
        ),
        True,
        True,
    ),
    "mamba": (
        lambda: hf.MambaForCausalLM(hf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **TEXT)),
        False,
        True,
    ),
    "t5": (t5, False, True),
    "bart": (bart, True, False),
    "mpnet": (mpnet, False, False),
    "bert": (bert, True, False),
    "bert-mlm": (lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZE, **TEXT)), True, True),
    "roberta": (
        lambda: hf.RobertaForSequenceClassification(
            hf.RobertaConfig(**SIZE, num_labels=3, max_position_embeddings=66, **TEXT)
        ),
        True,
        False,
    ),
    "vit": (vit, True, False),
}


def load(make: Callable[[], Any], folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A random model, saved and loaded as a user would; norms and biases are moved off 1 and 0."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=dtype)


def batch_for(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    classes = torch.tensor([0, 2, 1])
    if hasattr(model.config, "image_size"):
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator), "labels": classes}
    ids = torch.randint(3, 97, (3, 10), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 7:] = mask[1, 7:] = 0
    labels = classes if "Sequence" in type(model).__name__ else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def check(model: Any, tolerance: float, **options: Any) -> Replica:
    """Both losses of some probes against really perturbed copies, and the weights untouched."""
    batch = batch_for(model)
    replica = Replica(model, run_seed=5, **options)
    before = replica.digest()
    replica.prove(batch)
    for step, index in ((0, 0), (7, 3)):
        assert replica._prober is not None
        found = replica._prober.losses(step, index, batch, EPSILON)
        with torch.no_grad():
            expected = [
                float(really_perturbed(model, replica, step, index, s * EPSILON)(**batch).loss) for s in (1, -1)
            ]
        assert [each.loss for each in found] == pytest.approx(expected, abs=tolerance)
        assert abs(expected[0] - expected[1]) > 4 * tolerance, "the direction must matter, or nothing is shown"
    assert replica.digest() == before
    assert not any("forward" in module.__dict__ for module in model.modules())
    return replica


@pytest.mark.parametrize("name", MODELS)
def test_perturbed_losses_are_those_of_perturbed_weights(name: str, tmp_path: Path) -> None:
    make, batched, chunked = MODELS[name]
    replica = check(load(make, tmp_path), 5e-6)
    assert replica.verdict is not None
    assert (replica.verdict.batched, replica.verdict.chunked) == (batched, chunked), replica.verdict.reasons
    language = batch_for(replica.model)["labels"].dim() == 2
    said = " ".join(replica.verdict.reasons)
    assert ("two forwards per probe" in said) == (not batched)
    assert ("in one piece" in said) == (language and not chunked)


@pytest.mark.parametrize("selection", [SmallWeights(0.6), Rotation(2, 4)], ids=["small", "blocks"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_that_are_not_moved_are_not_perturbed(name: str, selection: Selection, tmp_path: Path) -> None:
    """The paths are those that all weights take."""
    make, batched, chunked = MODELS[name]
    replica = check(load(make, tmp_path), 5e-6, selection=selection)
    assert replica.verdict is not None
    assert (replica.verdict.batched, replica.verdict.chunked) == (batched, chunked), replica.verdict.reasons


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("t5", "two forwards per probe: encoder.block.0.layer.0.SelfAttention.relative_attention_bias is given a"),
        ("gemma2", "the head and its loss are computed in one piece: the model changes the logits after its head"),
        ("mamba", "used outside of the module that owns it: backbone.layers.0.mixer.conv1d.weight"),
    ],
)
def test_a_slower_path_says_why_and_cannot_be_asked_away(name: str, reason: str, tmp_path: Path) -> None:
    make, batched, _ = MODELS[name]
    model = load(make, tmp_path)
    verdict = Replica(model).prove(batch_for(model))
    assert any(text.startswith(reason) for text in verdict.reasons), verdict.reasons
    wish: dict[str, Any] = {"head": "chunked"} if batched else {"signs": "batched"}
    with pytest.raises(ModelError, match="is not right"):
        Replica(model, **wish).prove(batch_for(model))


def of_size(model: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    """A batch without padding that ends in T5's end of sequence."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 97, (rows, length), generator=generator)
    ids[:, -1] = 1
    labels = torch.arange(rows) % 3 if "Sequence" in type(model).__name__ else ids.clone()
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(
    ("make", "batched"),
    [
        (gpt2, True),
        (bert, True),
        (t5, False),
        (t5_classifier, False),
        (mpnet, False),
        (lambda: Nano(1.0), True),
        (lambda: Nano(0.03), True),
    ],
    ids=["gpt2", "bert", "t5", "t5-classifier", "mpnet", "nano", "nano-faint"],
)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
def test_lengths_and_rows_may_coincide(make: Callable[[], Any], batched: bool, rows: int) -> None:
    """Tensors without rows are told from those with rows by what they are, never by their sizes.

    The paths are the same whichever length the first batch has, and right for every other.
    """
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    verdicts = set()
    for first in (5, 2 * rows, 4 * rows):
        replica = Replica(model)
        verdict = replica.prove(of_size(model, rows, first))
        assert verdict.batched == batched, verdict.reasons
        verdicts.add((verdict.chunked, verdict.shifted, verdict.rows))
    assert len(verdicts) == 1
    assert replica._prober is not None
    for length in sorted({2, 3, 4, 5, 6, 8, 9, 2 * rows, 2 * rows + 1, 4 * rows, 6 * rows}):
        data = of_size(model, rows, length)
        found = replica._prober.losses(1, 0, data, EPSILON)
        with torch.no_grad():
            expected = [float(really_perturbed(model, replica, 1, 0, s * EPSILON)(**data).loss) for s in (1, -1)]
        assert [each.loss for each in found] == pytest.approx(expected, abs=5e-6), length


INPUTS = {"direction": "inputs"}


@pytest.mark.parametrize("name", MODELS)
def test_directions_of_inputs(name: str, tmp_path: Path) -> None:
    make, batched, chunked = MODELS[name]
    model = load(make, tmp_path)
    # One has a decoder too, and one sees images.
    texts = {n: v.repeat(POOL, *[1] * (v.dim() - 1))[:POOL] for n, v in batch_for(model).items()}
    more = {"texts": texts} if name in ("t5", "vit") else {}
    replica = check(model, 5e-6, direction="inputs", **more)
    assert replica.directions.inputs and replica.verdict is not None
    assert (replica.verdict.batched, replica.verdict.chunked) == (batched, chunked), replica.verdict.reasons


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
@pytest.mark.parametrize(
    "options",
    [
        {"signs": "sequential"},
        {"head": "full"},
        {"rank": 4},
        {"direction": "rademacher"},
        INPUTS,
        {**INPUTS, "rank": 2},
    ],
)
def test_other_paths_and_directions(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    check(load(MODELS[name][0], tmp_path), 5e-6, **options)


@pytest.mark.parametrize("name", ["opt", "bert"])
def test_gaussian_directions(name: str, tmp_path: Path) -> None:
    check(load(MODELS[name][0], tmp_path), 5e-6, direction="gaussian")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_widened_after_the_head(dtype: torch.dtype, tmp_path: Path) -> None:
    """Mamba gives float32 logits: the slices of its head must still be those of a head in half precision."""
    model = load(MODELS["mamba"][0], tmp_path, dtype)
    batch = batch_for(model)
    sliced, whole = Replica(model), Replica(model, head="full")
    assert sliced.prove(batch).chunked and not whole.prove(batch).chunked
    assert sliced._prober is not None and whole._prober is not None
    for index in range(3):
        both = zip(*(each.losses(0, index, batch, 0.05) for each in (sliced._prober, whole._prober)), strict=True)
        for found, expected in both:
            assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    """Half precision rounds every activation, so the two ways agree only as far as that."""
    model = load(MODELS[name][0], tmp_path, torch.bfloat16)
    batch = batch_for(model)
    replica = Replica(model)
    before = replica.digest()
    twin = load(MODELS[name][0], tmp_path)
    exact = Replica(twin)
    found = [replica.probe(0, k, batch, 0.05).projected_gradient for k in range(12)]
    expected = [exact.probe(0, k, batch, 0.05).projected_gradient for k in range(12)]
    assert replica.digest() == before
    assert float(torch.corrcoef(torch.tensor([found, expected]))[0, 1]) > 0.97


def test_lora_through_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(gpt2, tmp_path)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    replica = check(model, 5e-6)
    assert all("lora" in spec.name for spec in replica.layout.specs)
