"""A language model adapts to new prose: the quickstart's small GPT-2 and Python's language reference."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from benchmarks.learning.recipes import CONFIGS, recipe
from benchmarks.learning.tasks import Batch, Task, sample

_MODEL = CONFIGS / "quickstart/model"
_LENGTH = 32


class Prose(Task):
    """A GPT-2 of 1.09M weights that has read docstrings goes on to the language reference; all weights are trained."""

    name = "prose"
    title = "a GPT-2 of 1.09M weights, pretrained on docstrings, adapts to Python's language reference; all weights"
    budget = 1024
    interval = 128
    rate = 3e-5
    adamw_rate = 1e-3

    def model(self) -> nn.Module:
        """The quickstart's model."""
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(_MODEL, dtype=torch.float32).eval()
        return model

    @cached_property
    def train(self) -> Batch:
        """Packed sequences of the training topics."""
        return self._pack(self._parts[0])

    @cached_property
    def held_out(self) -> Batch:
        """256 packed sequences of the held-out topics."""
        return sample(self._pack(self._parts[1]))

    @cached_property
    def _parts(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        from pydoc_data.topics import topics

        parts: tuple[dict[str, list[str]], dict[str, list[str]]] = recipe("quickstart/make_data").split(topics)
        return parts

    def _pack(self, part: Mapping[str, list[str]]) -> Batch:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(_MODEL)
        flat: list[int] = []
        for row in recipe("quickstart/make_data").rows(part):
            flat += [*tokenizer.encode(row["text"], add_special_tokens=False, verbose=False), tokenizer.eos_token_id]
        count = len(flat) // _LENGTH
        ids = torch.tensor(flat[: count * _LENGTH]).view(count, _LENGTH)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
