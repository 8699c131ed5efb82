"""What the layers of a model are given, in one forward of random texts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
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

_ADVICE = f"set direction: {{kind: rank}}, or give zoray.Replica `texts`, the arguments of a forward of {POOL} rows"


class _Enough(Exception):
    """All inputs are there; what comes after them need not be computed."""


def random_texts(model: Any, seed: int) -> dict[str, torch.Tensor]:
    """What a language model, or a classifier over one, takes: `POOL` texts of random tokens.

    Those of an encoder-decoder end as it wants a text to end.

    Raises:
        ConfigError: the model does not say how many tokens it knows.
    """
    try:
        settings = model.config.get_text_config()
        vocabulary = int(settings.vocab_size)
    except AttributeError as error:
        raise ConfigError(
            f"{type(model).__name__} does not say how many tokens it knows, so there are no texts to find inputs with.",
            where="direction",
            advice=_ADVICE,
        ) from error
    words = _words(seed, 0, TOKENS) % np.uint64(vocabulary)
    tokens = torch.from_numpy(words.astype(np.int64)).view(POOL, _LENGTH)
    end = getattr(settings, "eos_token_id", None)
    if getattr(model.config, "is_encoder_decoder", False) and isinstance(end, int):
        tokens[tokens == end] = (end + 1) % vocabulary
        tokens[:, -1] = end
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def find_mixtures(
    model: nn.Module, texts: Mapping[str, torch.Tensor], seed: int, wanted: Collection[str] | None = None
) -> dict[str, Mixture]:
    """What each trained linear layer is given in a forward, the same bits on every machine.

    Args:
        model: with the weights the run begins with; they are not changed.
        texts: arguments of a forward of `POOL` rows.
        seed: stands in for inputs of layers that are given fewer.
        wanted: names of weights; by default all that `input_sides` names.

    Returns:
        By name of the weight.

    Raises:
        ModelError: the model takes other arguments, or cannot compute in float64.
    """
    layers = {name: (module, side) for name, module, side in watched(model) if wanted is None or name in wanted}
    made: dict[str, Mixture] = {}
    if not layers:
        return made
    missing = {}
    for number, (name, (module, side)) in enumerate(sorted(layers.items())):
        weight = module._parameters["weight"]
        assert weight is not None
        shape = shape_of(weight)
        missing[name] = partial(_signs, seed, number + 1, shape[1 if side == "cols" else 0])
    device = next(model.parameters()).device
    given = {name: value.to(device) for name, value in texts.items()}
    given = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    modules = {name: module for name, (module, _) in layers.items()}
    try:
        with suppress(_Enough), torch.no_grad(), _watching(model, modules, missing, made), in_float64(model):
            model(**given)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            raise
        raise ModelError(
            f"{type(model).__name__} cannot be run on texts of {', '.join(given)} in float64, to find the inputs of "
            f"its layers: {error}.",
            where="direction",
            advice=_ADVICE,
        ) from error
    for name in missing.keys() - made.keys():
        made[name] = Mixture.of(np.zeros((0, 0)), missing[name]())
    return made


def _words(seed: int, number: int, count: int) -> npt.NDArray[np.uint64]:
    generator = np.random.Philox(
        counter=np.array([0, 0, number, 0], np.uint64), key=np.array([seed, _DOMAIN], np.uint64)
    )
    return generator.random_raw(count)


def _signs(seed: int, number: int, features: int) -> npt.NDArray[np.int8]:
    """Signs (POOL, features) for a layer."""
    words = _words(seed, number, -(-POOL * features // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=POOL * features, bitorder="little")
    signs: npt.NDArray[np.int8] = (1 - 2 * bits.view(np.int8)).reshape(POOL, features)
    return signs


@contextmanager
def _watching(
    model: Any, modules: Mapping[str, nn.Module], missing: Mapping[str, Any], made: dict[str, Mixture]
) -> Iterator[None]:
    """Keeps what each module is given first, and breaks off when all have been given something, or at the head."""

    def keep(name: str, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if name not in made:
            made[name] = Mixture.of(_one_of_each(next(iter((*args, *named.values())))), missing[name]())
        if len(made) == len(modules) or module is head:
            raise _Enough

    def stop(module: nn.Module, args: object) -> None:
        raise _Enough

    head = getattr(model, "get_output_embeddings", lambda: None)()
    hooks = [
        # Before those that bring the module's weights in.
        module.register_forward_pre_hook(partial(keep, name), with_kwargs=True, prepend=True)
        for name, module in modules.items()
    ]
    if head is not None and head not in modules.values():
        hooks.append(head.register_forward_pre_hook(stop, prepend=True))
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
