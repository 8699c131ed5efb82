"""Functions that tests name as `objective`; what they return is easily told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

not_a_function = 3


def margin(outputs: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """How far the right class, or candidate, is ahead of the best other one."""
    right = batch["labels"][:, None]
    others = outputs.scatter(1, right, -torch.inf).amax(1)
    return outputs.gather(1, right).squeeze(1) - others


def last_logit(outputs: torch.Tensor, batch: Mapping[str, Any]) -> list[float]:
    """The logit of the last token's own number, of a language model."""
    assert outputs.shape[:2] == batch["input_ids"].shape == batch["labels"].shape
    return [float(row[-1, ids[-1]]) for row, ids in zip(outputs, batch["input_ids"], strict=True)]


def length(texts: list[str], batch: Mapping[str, Any]) -> list[int]:
    """Characters of each text in common with nothing: how much is written."""
    assert len(texts) == len(batch["references"])
    return [len(text) for text in texts]


def one_number(outputs: Any, batch: Mapping[str, Any]) -> float:
    return 1.0


def no_number(outputs: Any, batch: Mapping[str, Any]) -> list[float]:
    return [float("nan")] * len(outputs)


def fails(outputs: Any, batch: Mapping[str, Any]) -> list[float]:
    raise KeyError("gold")
