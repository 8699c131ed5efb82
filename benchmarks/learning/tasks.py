"""What is learned: three tasks, each with a pretrained model small enough for a run of some ten seconds on one core."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from zoray.models.activations import freeze_inputs, random_texts

Batch = dict[str, torch.Tensor]
IGNORED = -100
ROWS = 16
"""Rows of a batch: MeZO's."""
_EVAL_ROWS = 64
_HELD_OUT = 256


class Task(ABC):
    """A task; everything it returns is a pure function of its arguments.

    Attributes:
        name: its name in the results.
        title: what a reader is told.
        budget: forward passes of a run, of `ROWS` rows each.
        interval: forward passes between two measurements.
        rate, adamw_rate: middles of the grids of learning rates, of one direction per step and of AdamW.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    budget: ClassVar[int]
    interval: ClassVar[int]
    rate: ClassVar[float]
    adamw_rate: ClassVar[float]

    @abstractmethod
    def model(self) -> nn.Module:
        """The pretrained model, float32, in eval mode; parameters that are not trained do not require a gradient."""

    def adapted(self, r: int = 16) -> nn.Module:
        """The model with adapters that begin as inputs of their modules (`zoray.models.activations`), trained alone."""
        from peft import LoraConfig, inject_adapter_in_model

        model: Any = self.model().requires_grad_(False)
        torch.manual_seed(0)
        texts = random_texts(model, r)
        targets = ["c_attn", "c_proj", "c_fc"]
        wrapped = inject_adapter_in_model(LoraConfig(r=r, lora_alpha=r, target_modules=targets), model)
        freeze_inputs(wrapped, r, texts)
        return wrapped.eval()

    @property
    @abstractmethod
    def train(self) -> Batch:
        """All training examples."""

    @property
    @abstractmethod
    def held_out(self) -> Batch:
        """The examples that are only measured on."""

    @property
    def texts(self) -> Batch | None:
        """What tells the inputs of layers; None where random tokens can."""
        return None

    def batch(self, seed: int, index: int, count: int = ROWS) -> Batch:
        """The first rows of batch number `index` of the run of `seed`, the same for every method."""
        chosen = np.random.default_rng([seed, index]).integers(0, len(self.train["labels"]), ROWS)[:count]
        return rows(self.train, chosen)

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Mean loss over the held-out targets and the share of them that is predicted right."""
        total = torch.zeros(3, dtype=torch.float64)
        with torch.no_grad():
            for start in range(0, len(self.held_out["labels"]), _EVAL_ROWS):
                losses, right = scores(model, rows(self.held_out, slice(start, start + _EVAL_ROWS)))
                total += torch.tensor([float(losses.double().sum()), float(right.sum()), len(losses)])
        return float(total[0] / total[2]), float(total[1] / total[2])


def rows(batch: Batch, chosen: npt.NDArray[np.int64] | slice) -> Batch:
    """Some rows of a batch."""
    index = chosen if isinstance(chosen, slice) else torch.from_numpy(chosen)
    return {name: tensor[index] for name, tensor in batch.items()}


def sample(batch: Batch, count: int = _HELD_OUT) -> Batch:
    """`count` rows of a batch, always the same."""
    return rows(batch, np.random.default_rng(0).permutation(len(batch["labels"]))[:count])


def scores(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss (float32, differentiable) and whether the prediction is right, for each target of a batch."""
    output = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    logits = output if isinstance(output, torch.Tensor) else output.logits
    labels = batch["labels"]
    if labels.dim() == 2:
        chosen = labels[:, 1:] != IGNORED
        logits, labels = logits[:, :-1][chosen], labels[:, 1:][chosen]
    return functional.cross_entropy(logits.float(), labels, reduction="none"), logits.argmax(-1) == labels


def mean_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean loss over a batch's targets, differentiable."""
    return scores(model, batch)[0].mean()


@cache
def get(name: str) -> Task:
    """The task of that name, its data made once in a process."""
    from benchmarks.learning.docstrings import Docstrings
    from benchmarks.learning.prose import Prose
    from benchmarks.learning.sequence import Sequence

    makers: dict[str, Callable[[], Task]] = {"prose": Prose, "sequence": Sequence, "docstrings": Docstrings}
    return makers[name]()


VERSIONS = {"prose": 1, "sequence": 1, "docstrings": 1}
"""Raised whenever the data, the model or the budget of a task changes: results of other versions do not count."""
