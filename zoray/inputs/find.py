"""What the layers of a model are given, in one forward of random texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from zoray.errors import ConfigError, ModelError
from zoray.exact import in_float64
from zoray.inputs.layers import watched
from zoray.inputs.mixture import POOL, Mixture
from zoray.partitioned import shape_of

_LENGTH = 4
"""Tokens of each text; the last one's inputs are taken, which have seen the others."""

TOKENS = POOL * _LENGTH
"""Of all texts."""

_DOMAIN = 0x5A6F_7261_7902
"""Second half of the Philox key, as in `zoray.directions`."""


class _Enough(Exception):
    """All inputs are there; what comes after them need not be computed."""


def random_texts(model: Any, seed: int) -> dict[str, torch.Tensor]:
    """What a language model, or a classifier over one, takes: `POOL` texts of random tokens, on the model's device.

    Raises:
        ConfigError: the model does not say how many tokens it knows.
    """
    try:
        vocabulary = int(model.config.get_text_config().vocab_size)
    except AttributeError as error:
        raise ConfigError(
            f"{type(model).__name__} does not say how many tokens it knows, so there are no texts to find inputs with.",
            where="direction",
            advice=f"give Replica `texts`, the arguments of a forward of {POOL} rows, or direction 'rank'",
        ) from error
    words = np.random.Philox(counter=[0, 0, 0, 0], key=[seed, _DOMAIN]).random_raw(POOL * _LENGTH)
    tokens = torch.from_numpy((words % np.uint64(vocabulary)).astype(np.int64)).view(POOL, _LENGTH)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def find_mixtures(model: nn.Module, texts: Mapping[str, torch.Tensor], seed: int) -> dict[str, Mixture]:
    """What each trained linear layer is given in a forward, the same bits on every machine.

    Args:
        model: with the weights the run begins with; they are not changed.
        texts: arguments of a forward of `POOL` rows.
        seed: stands in for inputs of layers that are given fewer.

    Returns:
        By name of the weight, for all that `input_sides` names.

    Raises:
        ModelError: the model takes other arguments.
    """
    layers = {name: (module, side) for name, module, side in watched(model)}
    found: dict[str, npt.NDArray[np.float64]] = {}
    if layers:
        given = {name: value.to(next(model.parameters()).device) for name, value in texts.items()}
        modules = {name: module for name, (module, _) in layers.items()}
        try:
            with suppress(_Enough), torch.no_grad(), _watching(modules, found), in_float64(model):
                model(**given)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{type(model).__name__} cannot be run on texts of {', '.join(given)} to find the layers' inputs: "
                f"{error}.",
                where="direction",
                advice=f"give Replica `texts`, the arguments of a forward of {POOL} rows, or direction 'rank'",
            ) from error
    made = {}
    for number, (name, (module, side)) in enumerate(sorted(layers.items())):
        features = _features(module, side)
        stream = np.random.Philox(counter=[0, 0, number, 1], key=[seed, _DOMAIN]).random_raw(-(-POOL * features // 64))
        bits = np.unpackbits(stream.astype("<u8").view(np.uint8), count=POOL * features, bitorder="little")
        missing = (1 - 2 * bits.view(np.int8)).reshape(POOL, features)
        made[name] = Mixture.of(found.get(name, np.zeros((0, features))), missing)
    return made


def _features(module: nn.Module, side: str) -> int:
    weight = module._parameters["weight"]
    assert weight is not None
    return shape_of(weight)[1 if side == "cols" else 0]


@contextmanager
def _watching(modules: dict[str, nn.Module], found: dict[str, npt.NDArray[np.float64]]) -> Iterator[None]:
    """Keeps what each module is given first, and breaks off when all have been given something."""

    def keep(name: str, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if name not in found:
            found[name] = _one_of_each(next(iter((*args, *named.values()))))
            if len(found) == len(modules):
                raise _Enough

    hooks = [
        # Before those that bring the module's weights in.
        module.register_forward_pre_hook(partial(keep, name), with_kwargs=True, prepend=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _one_of_each(inputs: torch.Tensor) -> npt.NDArray[np.float64]:
    """The last token's of each text; of a module that is given some tokens only, such as an expert, the first ones."""
    flat = inputs.flatten(0, -2)
    if len(flat) and len(flat) % POOL == 0:
        flat = flat.view(POOL, -1, flat.shape[-1])[:, -1]
    kept: npt.NDArray[np.float64] = flat[:POOL].double().cpu().numpy()
    return kept
