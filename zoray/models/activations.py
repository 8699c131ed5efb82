"""Adapters whose A is what the model itself feeds to the module: only B is trained.

With W + s B A, a direction of B moves W by its columns times combinations of the rows of A. Where these rows are inputs
of the module, a direction changes its outputs for the inputs that occur, and hardly for others. The gradient of W, a
sum of outer products with inputs, lies among such directions; of all directions of W, most miss it.

LoRA-FA (Zhang et al. 2023, arXiv 2308.03303) trains B alone, for the sake of memory; EVA (Paischer et al. 2024, arXiv
2410.07170) begins with A from activations. The texts here are random tokens, so that nothing but the base model and the
seed is needed, and all replicas have the same bits (`zoray.exact`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from zoray.errors import ConfigError
from zoray.exact import in_float64, rounded
from zoray.models.limits import max_positions

_LENGTH = 16
"""Tokens of each text; the last one's inputs are taken, which have seen the others."""

_WHERE = "trainable.lora.init_lora_weights"


def random_texts(model: Any, count: int) -> dict[str, torch.Tensor]:
    """What a language model, or a classifier over one, takes: texts of random tokens, from torch's own generator."""
    length = min(_LENGTH, max_positions(model) or _LENGTH)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (count, length))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def freeze_inputs(model: nn.Module, r: int, texts: dict[str, torch.Tensor]) -> None:
    """Makes the A of every adapter the inputs of its module, one row for each text, and freezes it.

    Args:
        model: any with LoRA adapters of rank `r` whose B is 0.
        texts: arguments of a forward of `r` rows.

    Raises:
        ConfigError: an adapter's module has no inputs of that kind, or gets none.
    """
    adapters = dict(lora_layers(model))
    with torch.no_grad(), in_float64(model), _first_inputs(adapters) as found:
        model(**texts)
    for name, module in adapters.items():
        matrices = [each.weight for each in getattr(module, "lora_A", {}).values()]
        if not matrices or any(matrix.dim() != 2 for matrix in matrices):
            raise ConfigError(
                f"The adapter of {name} is not that of a linear layer, and cannot begin with its inputs.",
                where=_WHERE,
                advice="name linear layers only in trainable.lora.target_modules, or leave init_lora_weights out",
            )
        if name not in found or not found[name].any():
            raise ConfigError(
                f"{name} is given nothing in a forward of {r} random texts, so there are no inputs its adapter could "
                "begin with.",
                where=_WHERE,
                advice="raise trainable.lora.r, which is the number of texts, leave the module out of "
                "trainable.lora.target_modules, or leave init_lora_weights out",
            )
        for matrix in matrices:
            matrix.data.copy_(scaled_rows(found[name], r))
    freeze(model)


def freeze(model: nn.Module) -> None:
    """Leaves every A as it is: only B is trained."""
    for _, module in lora_layers(model):
        getattr(module, "lora_A", nn.Module()).requires_grad_(False)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model that have an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module  # type: ignore[misc]


def scaled_rows(inputs: torch.Tensor, r: int) -> torch.Tensor:
    """A of shape (r, in), float64, from inputs of a module: (r, length, in), or (tokens, in).

    The last token's of each text; of a module that is given some tokens only, such as an expert, those of the first r.

    Rows are as long as each other, sqrt(in / r): attention sinks have inputs a thousand times those of other tokens. So
    a sum of the rows with random signs is about as long as a vector of signs, and the adapter of scale 1 is perturbed
    by about as much as the whole matrix would be. Rows that there is no token for are 0.
    """
    flat = inputs.flatten(0, -2)
    chosen = flat[:r] if not len(flat) or len(flat) % r else flat.view(r, -1, flat.shape[-1])[:, -1]
    rows = chosen.new_zeros(r, inputs.shape[-1])
    for number, row in enumerate(chosen):
        if bool(row.any()):
            # Multiples of a power of two with few bits: the sum of their squares is exact, and so the same everywhere.
            grid = rounded(row)
            rows[number] = grid * (len(row) / r / grid.square().sum()).sqrt()
    return rows


@contextmanager
def _first_inputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """What each module is given first while the block runs."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.setdefault(name, next(iter((*args, *named.values()))))

    hooks = [
        module.register_forward_pre_hook(partial(keep, name), with_kwargs=True) for name, module in modules.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
