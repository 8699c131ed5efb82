"""Which parameters are trained: all, those of a pattern, biases and norms, or adapters; and which of them when."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from zoray.config import (
    BIAS_AND_NORM,
    LoraConfig,
    RunConfig,
    TrainableBlocks,
    TrainableSparse,
)
from zoray.errors import ConfigError, ModelError
from zoray.models.activations import freeze, freeze_inputs, random_texts
from zoray.models.words import reason, some
from zoray.selection import Rotation, Selection, SmallWeights

_NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def chosen(config: RunConfig) -> tuple[str, str] | None:
    """The words for a set of the model's own parameters, and the key that has them; None where adapters are trained."""
    trainable = config.trainable
    if isinstance(trainable, str):
        return trainable, "trainable"
    if isinstance(trainable, TrainableSparse):
        return trainable.sparse.parameters, "trainable.sparse.parameters"
    if isinstance(trainable, TrainableBlocks):
        return trainable.blocks.parameters, "trainable.blocks.parameters"
    return None


def selection(config: RunConfig) -> Selection | None:
    """Which of the trained weights a step moves; None: all of them."""
    trainable = config.trainable
    if isinstance(trainable, TrainableSparse):
        return SmallWeights(trainable.sparse.sparsity)
    if isinstance(trainable, TrainableBlocks):
        return Rotation(trainable.blocks.count, trainable.blocks.steps)
    return None


def select(model: nn.Module, words: str, where: str = "trainable", new: Sequence[str] = ()) -> None:
    """Applies `full`, `bias_and_norm` or a regular expression; a tied parameter is found under each of its names.

    Args:
        where: the key of the configuration that has the words.
        new: names of parameters that the checkpoint did not have; they are trained beside biases and norms.

    Raises:
        ConfigError: nothing matches.
    """
    if words == "full":
        # What the model itself froze (fixed position tables, quantised weights) stays frozen.
        return
    named = list(model.named_parameters(remove_duplicate=False))
    if words == BIAS_AND_NORM:
        wanted = {id(parameter) for parameter in _biases_and_norms(model)}
        advice = "Use lora, full or a pattern."
        what = "This model has neither biases nor norms"
    else:
        wanted = {id(p) for name, p in named if re.search(words, name)}
        advice = f"Their names are like {some([name for name, _ in named])}."
        what = f"The pattern {words!r} matches none of the model's {len(named)} parameters"
    found = {id(p) for _, p in named if p.is_floating_point() and id(p) in wanted}
    if not found:
        raise ConfigError(f"{what}.", where=where, advice=advice)
    if words == BIAS_AND_NORM:
        found |= {id(p) for name, p in named if name in new}
    for _, parameter in named:
        parameter.requires_grad_(id(parameter) in found)


def _biases_and_norms(model: nn.Module) -> Iterator[nn.Parameter]:
    """What modules call a bias of theirs (Ben Zaken et al. 2022, BitFit), and all that norms have.

    A norm is told by its class: that of torch, or one that a model has of its own and calls so (`LlamaRMSNorm`).
    """
    for module in model.modules():
        norm = isinstance(module, _NORMS) or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if norm or name == "bias" or name.endswith("_bias"):
                yield parameter


def peft(what: str) -> Any:
    """The library that makes adapters.

    Args:
        what: they are wanted for, below `trainable`.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import peft as library
    except ImportError as error:
        raise ModelError(
            f"`trainable: {{{what}: ...}}` needs peft.",
            where="trainable",
            advice="Install it: pip install 'zoray[lora]'.",
        ) from error
    return library


def task_type(library: Any, config: RunConfig) -> Any:
    """What `peft` calls the run's kind of task."""
    kinds = {"causal": "CAUSAL_LM", "masked": "FEATURE_EXTRACTION", "classifier": "SEQ_CLS"}
    return library.TaskType[kinds[config.task.architecture]]


def add_adapters(model: Any, lora: LoraConfig, config: RunConfig, new: list[str]) -> nn.Module:
    """Wraps the model with LoRA adapters in its own dtype; the modules of `new` parameters are trained with them.

    Those of a model on the device "meta" have no values.

    Raises:
        ModelError: `peft` is not installed.
        ConfigError: `target_modules` matches nothing, or modules that cannot begin as `init_lora_weights` says.
    """
    library = peft("lora")
    adapters = library.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=lora.target_modules,
        bias=lora.bias,
        task_type=task_type(library, config),
        modules_to_save=_new_modules(new) or None,
    )
    there = next(model.parameters()).device.type != "meta"
    # Before peft draws any numbers.
    texts = random_texts(model, lora.r) if there and lora.init_lora_weights == "activations" else None
    try:
        wrapped: nn.Module = library.get_peft_model(model, adapters, autocast_adapter_dtype=False)
    except ValueError as error:
        matrices = [name.rpartition(".")[0] for name, p in model.named_parameters() if p.dim() == 2]
        raise ConfigError(
            f"LoRA adapters cannot be added: {reason(error)}.",
            where="trainable.lora.target_modules",
            advice=f"Name endings of modules such as {some(matrices)}; or use all-linear.",
        ) from error
    if texts is not None:
        freeze_inputs(wrapped, lora.r, texts)
    elif lora.init_lora_weights == "activations":
        freeze(wrapped)
    return wrapped


def _new_modules(new: list[str]) -> list[str]:
    """The outermost modules that hold the new parameters: `classifier` for a head, the path of a pooler."""
    modules = (name.rpartition(".")[0] if ".pooler." in name else name.partition(".")[0] for name in new)
    return list(dict.fromkeys(modules))


def trains(model: nn.Module, name: str) -> bool:
    """Whether a parameter is trained, itself or as the copy `peft` made of it."""
    return any(
        parameter.requires_grad and f".{each}".replace(".modules_to_save.default", "").endswith(f".{name}")
        for each, parameter in model.named_parameters()
    )
