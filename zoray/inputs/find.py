"""What the layers of a model are given, in one forward of a few texts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
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

RANDOM_TOKENS = 4
"""Tokens of each random text; the last one's inputs are taken, which have seen the others."""

TEXT_TOKENS = 16
"""Tokens of each text of the training data: a classifier sums up all of them."""

_DOMAIN = 0x5A6F_7261_7902
"""Second half of the Philox key, as in `zoray.directions`."""

_ADVICE = f"set direction: {{kind: rank}}, or give zoray.Replica `texts`, the arguments of a forward of {POOL} rows"


class _Enough(Exception):
    """All inputs are there; what comes after them need not be computed."""


def random_texts(model: Any, seed: int) -> dict[str, torch.Tensor]:
    """What a language model, or a classifier over one, takes: `POOL` texts of random tokens.

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
    words = _words(seed, 0, POOL * RANDOM_TOKENS) % np.uint64(vocabulary)
    tokens = torch.from_numpy(words.astype(np.int64)).view(POOL, RANDOM_TOKENS)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def find_mixtures(
    model: nn.Module, texts: Mapping[str, torch.Tensor], seed: int, wanted: Collection[str] | None = None
) -> dict[str, Mixture]:
    """What each trained linear layer is given in a forward, the same bits on every machine.

    What a layer is given has much in common, as a rule, so that sums of it are mostly that. In a language model it is
    worth having. A classifier's head it moves to more or less of a class for all examples alike, and a probe measures
    how often each class is in its batch; so of a model that is no language model the mean is taken off, of what all of
    its layers are given.

    Args:
        model: with the weights the run begins with; they are not changed.
        texts: arguments of a forward of `POOL` rows. Of each text, the last token is taken that its `attention_mask`
            does not hide, if there is one. Those of an encoder-decoder are made to end as it wants a text to end.
        seed: stands in for inputs of layers that are given fewer.
        wanted: names of weights; by default all that `input_sides` names.

    Returns:
        By name of the weight.

    Raises:
        ModelError: the model takes other arguments, or cannot compute in float64.
    """
    layers = {name: (module, side) for name, module, side in watched(model) if wanted is None or name in wanted}
    if not layers:
        return {}
    missing = {}
    for number, (name, (module, side)) in enumerate(sorted(layers.items())):
        weight = module._parameters["weight"]
        assert weight is not None
        shape = shape_of(weight)
        missing[name] = partial(_signs, seed, number + 1, shape[1 if side == "cols" else 0])
    device = next(model.parameters()).device
    given = {name: value.to(device) for name, value in texts.items()}
    given = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    mask = given.get("attention_mask")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "input_ids" in given:
        given["input_ids"], mask = _ended(model, given["input_ids"], mask)
    found = _Found(model, {module: name for name, (module, _) in layers.items()}, missing, mask)
    try:
        with suppress(_Enough), torch.no_grad(), found.watching(), in_float64(model):
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
    return found.mixtures()


def _ended(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The texts with one end each, at their last token, and where they have tokens but that one, which is all texts'.

    Classifiers look for the end, and the first tokens of a text lack it.
    """
    settings = model.config.get_text_config()
    end = getattr(settings, "eos_token_id", None)
    if not isinstance(end, int):
        return tokens, mask
    mask = torch.ones_like(tokens) if mask is None else mask.clone()
    place = torch.arange(len(tokens), device=tokens.device), _last(mask)
    tokens = torch.where(tokens == end, (end + 1) % int(settings.vocab_size), tokens)
    tokens[place] = end
    mask[place] = 0
    return tokens, mask


def _last(mask: torch.Tensor) -> torch.Tensor:
    """Position of the last token of each row that `attention_mask` (rows, tokens) does not hide."""
    return (mask != 0).long().mul(torch.arange(mask.shape[1], device=mask.device)).argmax(1)


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


class _Found:
    """What a model's linear layers are given first, in one forward.

    Args:
        names: of the modules that are wanted.
        missing: by name, signs in place of inputs that are 0 or not there.
        mask: `attention_mask` of the texts.
    """

    def __init__(
        self,
        model: Any,
        names: Mapping[nn.Module, str],
        missing: Mapping[str, Callable[[], npt.NDArray[np.int8]]],
        mask: torch.Tensor | None,
    ) -> None:
        self._model, self._names, self._missing, self._mask = model, names, missing, mask
        self._output = getattr(model, "get_output_embeddings", lambda: None)()
        self._made: dict[str, Mixture] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Break the forward off when all is known: of a language model, before its head at the latest."""
        modules = [*self._names]
        if self._output is not None and self._output not in self._names:
            modules.append(self._output)
        # Before those that bring the module's weights in.
        hooks = [each.register_forward_pre_hook(self._keep, with_kwargs=True, prepend=True) for each in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def mixtures(self) -> dict[str, Mixture]:
        """By name of the weight, of all that were wanted."""
        for name in self._missing.keys() - self._made.keys():
            self._made[name] = Mixture.of(np.zeros((0, 0)), self._missing[name]())
        return self._made

    def _keep(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        name = self._names.get(module, "")
        if name and name not in self._made:
            inputs = _one_of_each(next(iter((*args, *named.values()))), self._mask)
            self._made[name] = Mixture.of(inputs, self._missing[name](), centred=self._output is None)
        if len(self._made) == len(self._names) or module is self._output:
            raise _Enough


def _one_of_each(inputs: torch.Tensor, mask: torch.Tensor | None = None) -> npt.NDArray[np.float64]:
    """The last token's of each text; of a module that is given some tokens only, such as an expert, the first ones.

    Args:
        inputs: (..., features).
        mask: (POOL, tokens), 0 where there is no token.
    """
    flat = inputs.flatten(0, -2)
    if mask is not None and inputs.shape[:-1] == mask.shape:
        flat = inputs[torch.arange(len(mask), device=mask.device), _last(mask)]
    elif len(flat) and len(flat) % POOL == 0:
        flat = flat.view(POOL, -1, flat.shape[-1])[:, -1]
    kept: npt.NDArray[np.float64] = flat[:POOL].double().cpu().numpy()
    return kept
