"""Prefix tuning: keys and values of tokens that are not there, trained in place of weights (Li and Liang 2021).

They begin as what the model makes of real tokens, since random ones do poorly (Malladi et al. 2023, MeZO, appendix
E.5). Every replica makes them itself, and they must be the same bits on any machine (`zoray.exact`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoray.config import PrefixConfig, RunConfig
from zoray.errors import ModelError
from zoray.exact import in_float64, rounded
from zoray.models.trainable import peft, task_type, trains
from zoray.models.words import reason, some


def add_prefix(model: Any, prefix: PrefixConfig, config: RunConfig, new: list[str]) -> nn.Module:
    """Wraps the model with a prefix, in its own dtype; a classification head of `new` parameters is trained with it.

    The prefix of a model on the device "meta" has no values.

    Args:
        model: all of it in this process.

    Raises:
        ModelError: `peft` is not installed, the model keeps no keys and values of earlier tokens, or more is new than
            `peft` saves beside a prefix.
    """
    library = peft("prefix")
    settings = library.PrefixTuningConfig(
        task_type=task_type(library, config), num_virtual_tokens=prefix.num_virtual_tokens
    )
    there = next(model.parameters()).device.type != "meta"
    try:
        values = _activations(model, prefix.num_virtual_tokens) if there else None
        wrapped: Any = library.get_peft_model(model, settings, autocast_adapter_dtype=False)
        encoder = wrapped.prompt_encoder["default"]
        encoder.to(getattr(torch, config.dtype))
        if values is None:
            # Looked up by number, and no part of the model: they need values.
            wrapped.prompt_tokens["default"] = torch.arange(prefix.num_virtual_tokens, device="cpu")
        else:
            encoder.embedding.weight.data.copy_(values.view(encoder.embedding.weight.shape))
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be given a prefix: {reason(error)}.",
            where="trainable.prefix",
            advice="train this model with lora",
        ) from error
    if lost := [name for name in new if not trains(wrapped, name)]:
        raise ModelError(
            f"The checkpoint {config.model} has no weights for {some(lost)}, which `peft` does not save with a prefix.",
            where="trainable.prefix",
            advice="train this model with lora, or begin with a checkpoint that has them",
        )
    trained: nn.Module = wrapped
    return trained


def _activations(model: Any, count: int) -> torch.Tensor:
    """Keys and values of `count` random tokens, float64 of shape (tokens, layers, 2, heads, head size)."""
    from transformers import DynamicCache

    tokens = torch.randint(model.config.get_text_config().vocab_size, (1, count))
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad(), in_float64(model):
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, use_cache=True)
    layers = [(layer.keys, layer.values) for layer in cache.layers if layer.keys is not None and layer.keys.numel()]
    if not layers:
        raise ValueError("it keeps no keys and values of earlier tokens")
    values = [torch.stack([rounded(part[0]) for part in pair]) for pair in layers]
    # (layers, 2, heads, tokens, head size), as they are split by peft
    return torch.stack(values).permute(3, 0, 1, 2, 4).contiguous()
