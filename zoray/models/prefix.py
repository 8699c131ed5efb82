"""Prefix tuning: keys and values of tokens that are not there, trained in place of weights (Li and Liang 2021).

They begin as what the model makes of real tokens, since random ones do poorly (Malladi et al. 2023, MeZO, appendix
E.5). Every replica makes them itself, and they must be the same bits on any machine. No float32 forward is; so this one
is computed in float64, layer by layer, and then rounded so coarsely that what machines differ by is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from zoray.config import PrefixConfig, RunConfig
from zoray.errors import ModelError
from zoray.models.trainable import peft, task_type, trains
from zoray.models.words import reason, some

_FINENESS = 8
"""Bits by which the grid that values are rounded to is finer than the largest of its layer."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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
    with torch.no_grad(), _in_float64(model):
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, use_cache=True)
    layers = [(layer.keys, layer.values) for layer in cache.layers if layer.keys is not None and layer.keys.numel()]
    if not layers:
        raise ValueError("it keeps no keys and values of earlier tokens")
    rounded = [torch.stack([_rounded(part[0]) for part in pair]) for pair in layers]
    # (layers, 2, heads, tokens, head size), as they are split by peft
    return torch.stack(rounded).permute(3, 0, 1, 2, 4).contiguous()


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """Values on a grid of about 2^8 steps between 0 and the largest.

    With errors of 1e-13 of the largest value, one in 10^10 values falls to another side on another machine.
    """
    exponent = int(torch.frexp(values.abs().max()).exponent)
    grid = 2.0 ** (exponent - _FINENESS)
    return torch.round(values / grid) * grid


@contextmanager
def _in_float64(model: Any) -> Iterator[None]:
    """Forwards of the model compute in float64; a module's parameters are widened for the time of its call alone."""
    experts = model.get_experts_implementation()
    before: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def widen(module: nn.Module, args: object) -> None:
        before[module] = dict(module._parameters)
        for name, parameter in before[module].items():
            if parameter is not None and parameter.dtype in _FLOATS:
                module._parameters[name] = nn.Parameter(parameter.detach().double(), requires_grad=False)

    def restore(module: nn.Module, args: object, output: object) -> None:
        module._parameters.update(before.pop(module, {}))

    hooks = []
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            hooks.append(module.register_forward_pre_hook(widen))
            hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        # The others have kernels for shorter floats alone.
        model.set_experts_implementation("eager")
        with _Wider():
            yield
    finally:
        model.set_experts_implementation(experts)
        for hook in hooks:
            hook.remove()


class _Wider(TorchFunctionMode):
    """Whoever asks for a shorter float gets float64: many models compute norms and softmax in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called instead of every torch function."""
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        wide = {name: torch.float64 if _is_short(value) else value for name, value in (kwargs or {}).items()}
        return func(*(torch.float64 if _is_short(value) else value for value in args), **wide)


def _is_short(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in _FLOATS
