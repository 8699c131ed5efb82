"""A small transformer that knows eight operations on sequences learns which of them is meant where nothing says so.

`python -m benchmarks.learning.sequence` pretrains it by backpropagation, a minute on one thread, and writes the folder
`sequence-model` beside this file. A row is: prompt, 8 symbols, separator, the 8 symbols that come out. Seven rows in
ten say with their prompt which operation it is; in the others the prompt is blank, and all operations are equally
likely. The task is the blank prompt with one operation, sorting downwards: the model knows how, and must learn that it
should.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from benchmarks.learning.tasks import IGNORED, Batch, Task, mean_loss

_FOLDER = Path(__file__).parent / "sequence-model"
_SYMBOLS, _WIDTH = 24, 8
_Ints = npt.NDArray[np.int64]

OPERATIONS: tuple[Callable[[_Ints], _Ints], ...] = (
    lambda x: x,
    lambda x: x[:, ::-1],
    lambda x: np.sort(x, 1),
    lambda x: np.sort(x, 1)[:, ::-1],
    lambda x: (x + 1) % _SYMBOLS,
    lambda x: np.roll(x, 1, 1),
    lambda x: np.roll(x, 4, 1),
    lambda x: x[:, [1, 0, 3, 2, 5, 4, 7, 6]],
)
DOWNWARDS = 3
BLANK = _SYMBOLS + len(OPERATIONS)
SEPARATOR = BLANK + 1
_STEPS, _BATCH, _PEAK = 1500, 64, 2e-3


def examples(random: np.random.Generator, operations: _Ints, prompts: _Ints) -> Batch:
    """One row for each of the operations; only what comes out has labels."""
    count = len(operations)
    taken = np.stack([random.permutation(_SYMBOLS)[:_WIDTH] for _ in range(count)])
    given = np.empty_like(taken)
    for number, operation in enumerate(OPERATIONS):
        chosen = operations == number
        given[chosen] = operation(taken[chosen])
    table = np.concatenate([prompts[:, None], taken, np.full((count, 1), SEPARATOR), given], 1)
    ids = torch.from_numpy(table)
    labels = ids.clone()
    labels[:, :-_WIDTH] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Sequence(Task):
    """The blank prompt means sorting downwards; all weights are trained."""

    name = "sequence"
    title = "a GPT-2 of 0.15M weights that knows eight operations on sequences learns which is meant; all weights"
    budget = 2048
    interval = 128
    rate = 3e-5
    adamw_rate = 3e-4

    def model(self) -> nn.Module:
        """The pretrained transformer."""
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(_FOLDER, dtype=torch.float32).eval()
        return model

    @cached_property
    def train(self) -> Batch:
        """4,096 rows."""
        return self._rows(1, 4096)

    @cached_property
    def held_out(self) -> Batch:
        """256 rows."""
        return self._rows(2, 256)

    def _rows(self, seed: int, count: int) -> Batch:
        return examples(np.random.default_rng(seed), np.full(count, DOWNWARDS), np.full(count, BLANK))


def pretrain() -> None:
    """Train the model from random weights and write it, rounded to bfloat16."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    sizes = {"vocab_size": 40, "n_positions": 24, "n_embd": 64, "n_layer": 3, "n_head": 4, "initializer_range": 0.05}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(_STEPS):
        rate = _PEAK * min(1, (step + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * step / _STEPS))
        for group in optimizer.param_groups:
            group["lr"] = rate
        operations = random.integers(0, len(OPERATIONS), _BATCH)
        prompts = np.where(random.random(_BATCH) < 0.3, BLANK, _SYMBOLS + operations)
        loss = mean_loss(model, examples(random, operations, prompts))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}  loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(_FOLDER)
    print(
        "the task's loss and accuracy before it is learned: {:.3f}, {:.3f}".format(*Sequence().evaluate(model.float()))
    )


if __name__ == "__main__":
    pretrain()
