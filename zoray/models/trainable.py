"""Which parameters are trained: all, those of a pattern, or low-rank adapters."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from zoray.config import LoraConfig, RunConfig
from zoray.errors import ConfigError, ModelError
from zoray.models.words import reason, some


def select(model: nn.Module, trainable: str) -> None:
    """Applies `full` or a regular expression; a tied parameter is found under each of its names."""
    if trainable == "full":
        # What the model itself froze (fixed position tables, quantised weights) stays frozen.
        return
    named = list(model.named_parameters(remove_duplicate=False))
    chosen = {id(p) for name, p in named if p.is_floating_point() and re.search(trainable, name)}
    if not chosen:
        raise ConfigError(
            f"The pattern {trainable!r} matches none of the model's {len(named)} parameters.",
            where="trainable",
            advice=f"Their names are like {some([name for name, _ in named])}.",
        )
    for _, parameter in named:
        parameter.requires_grad_(id(parameter) in chosen)


def add_adapters(model: Any, lora: LoraConfig, config: RunConfig, new: list[str]) -> nn.Module:
    """Wraps the model with LoRA adapters in its own dtype; the modules of `new` parameters are trained with them.

    Raises:
        ModelError: `peft` is not installed.
        ConfigError: `target_modules` matches nothing.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            "`trainable: {lora: ...}` needs peft.", where="trainable", advice="Install it: pip install 'zoray[lora]'."
        ) from error
    kinds = {"causal": "CAUSAL_LM", "masked": "FEATURE_EXTRACTION", "classifier": "SEQ_CLS"}
    adapters = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=lora.target_modules,
        bias=lora.bias,
        task_type=peft.TaskType[kinds[config.task.architecture]],
        modules_to_save=_new_modules(new) or None,
    )
    try:
        return peft.get_peft_model(model, adapters, autocast_adapter_dtype=False)
    except ValueError as error:
        matrices = [name.rpartition(".")[0] for name, p in model.named_parameters() if p.dim() == 2]
        raise ConfigError(
            f"LoRA adapters cannot be added: {reason(error)}.",
            where="trainable.lora.target_modules",
            advice=f"Name endings of modules such as {some(matrices)}; or use all-linear.",
        ) from error


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
