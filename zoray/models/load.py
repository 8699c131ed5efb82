"""From a checkpoint to weights that can be trained, the same bits in every process that loads it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zoray.config import RunConfig, TrainableLora, TrainablePrefix
from zoray.errors import ModelError
from zoray.models.prefix import add_prefix
from zoray.models.source import find, quiet
from zoray.models.trainable import add_adapters, chosen, select, trains
from zoray.models.words import reason, some
from zoray.partitioned import is_spilled
from zoray.stores import is_uri, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

AUTO = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classifier": "AutoModelForSequenceClassification",
}
"""The class of `transformers` that loads each kind of model."""


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with the model.

    Raises:
        ModelError: the model cannot be found, or has no tokenizer.
    """
    source = find(config)
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**source)
    except Exception as error:
        raise ModelError(
            f"The tokenizer of {config.model} cannot be loaded: {reason(error)}.",
            where="model",
            advice="Save the tokenizer into the folder of the model (tokenizer.save_pretrained).",
        ) from error
    return tokenizer


def load_model(
    config: RunConfig, *, num_labels: int | None = None, id2label: Mapping[int, str] | None = None
) -> nn.Module:
    """The model for the configuration's task, on the CPU, in evaluation mode, with `trainable` applied.

    All parameters and buffers are contiguous and start at addresses divisible by 64. New weights (a classification
    head, adapters) are drawn from `seed`, whatever random numbers were drawn before, and leave no trace in them.

    Args:
        config: `model`, `dtype`, `task.kind`, `trainable` and `seed` decide.
        num_labels: classes, for a classification.
        id2label: their names, if they have any.

    Raises:
        ModelError: the model is missing, damaged, or not of the kind the task needs.
        ConfigError: `trainable` matches nothing.
    """
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(config.seed)
        model, new = _from_pretrained(config, num_labels, id2label)
        if isinstance(config.trainable, TrainableLora):
            model = add_adapters(model, config.trainable.lora, config, new)
        elif isinstance(config.trainable, TrainablePrefix):
            model = add_prefix(model, config.trainable.prefix, config, new)
    if (words := chosen(config)) is not None:
        select(model, *words, new)
    frozen = [name for name in new if not trains(model, name)]
    if frozen:
        _log.warning("%s are new and random, and will stay so: trainable does not match them", ", ".join(frozen))
    _reallocate(model)
    return model.eval()


def _from_pretrained(
    config: RunConfig, num_labels: int | None, id2label: Mapping[int, str] | None
) -> tuple[nn.Module, list[str]]:
    """The model, and the names of the parameters its checkpoint did not have."""
    source = find(config)
    import transformers

    labels: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    if id2label is not None:
        labels |= {"id2label": dict(id2label), "label2id": {name: i for i, name in id2label.items()}}
    auto = getattr(transformers, AUTO[config.task.architecture])
    attention = {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    try:
        settings = transformers.AutoConfig.from_pretrained(**source, **labels)
        require_kind(config, settings, auto)
        loaded: Any = auto.from_pretrained(
            **source, config=settings, dtype=getattr(torch, config.dtype), output_loading_info=True, **attention
        )
    except ModelError:
        raise
    except Exception as error:
        raise explain(config, num_labels, error) from error
    model, report = loaded
    if is_uri(config.model):
        # What is saved of it must not name a folder of this machine's cache.
        model.name_or_path = model.config._name_or_path = shown(config.model)
    new = sorted(report["missing_keys"])
    _require_whole(config, model, new)
    _set_use_cache(model)
    if config.task.architecture == "classifier" and model.config.get_text_config().pad_token_id is None:
        _set_padding(config, model)
    return model, new


def require_kind(config: RunConfig, settings: Any, auto: Any) -> None:
    """Refuses a model whose architecture cannot do the task, before its weights are read.

    Args:
        config: `model` and `task.kind`.
        settings: the model's own configuration.
        auto: the class of `transformers` that would load it.

    Raises:
        ModelError: it has no class for the task, or sees what it is to predict.
    """
    remote = getattr(settings, "auto_map", None) or {}
    if type(settings) not in auto._model_mapping and auto.__name__ not in remote:
        wanted = {
            "causal": "causal language model",
            "masked": "masked language model",
            "classifier": "sequence classifier",
        }
        raise ModelError(
            f"{config.model} is of type {settings.model_type}, which cannot be loaded as a "
            f"{wanted[config.task.architecture]}.",
            where="model and task.kind",
            advice="Choose another model, or another task.kind.",
        )
    from transformers import AutoModelForMaskedLM

    bidirectional = type(settings) in AutoModelForMaskedLM._model_mapping and not settings.is_encoder_decoder
    if config.task.architecture == "causal" and bidirectional and getattr(settings, "is_decoder", None) is False:
        raise ModelError(
            f"{config.model} ({settings.model_type}) is bidirectional: each token would see the one it is to predict.",
            where="model and task.kind",
            advice="Use task.kind classification, without a prompt or with {mask} in it, or a decoder such as GPT-2.",
        )


def _require_whole(config: RunConfig, model: Any, new: list[str]) -> None:
    """Refuses a checkpoint without weights that are not a new classification head's (or the pooler's before it)."""
    body = f"{model.base_model_prefix}."
    headless = config.task.architecture != "classifier"
    lost = [name for name in new if headless or (name.startswith(body) and ".pooler." not in name)]
    if lost:
        raise ModelError(
            f"The checkpoint {config.model} has no weights for {some(lost)}.",
            where="model",
            advice="It is damaged, or of another architecture than its config.json says.",
        )


def explain(config: RunConfig, num_labels: int | None, error: Exception) -> ModelError:
    """What went wrong in from_pretrained."""
    text = str(error)
    if "SafetensorError" in type(error).__name__:
        what, advice = f"A weight file is damaged: {reason(error)}", "Copy or download the model again."
    elif "trust_remote_code" in text:
        what = "The model comes with its own Python code"
        advice = "Read that code, and set trust_remote_code: true if you trust it."
    elif "ignore_mismatched_sizes" in text:
        what = f"The checkpoint's weights have other shapes than a model with {num_labels or 'no'} labels"
        advice = "Set task.num_labels to the number of classes the checkpoint was trained for."
    elif "ttention" in text and config.attn_implementation:
        what = f"The model cannot use attn_implementation {config.attn_implementation}: {reason(error)}"
        advice = "Leave attn_implementation out, or use eager or sdpa."
    else:
        what, advice = reason(error), "Check that `transformers` can load this model."
    return ModelError(f"The model {config.model} cannot be loaded. {what}.", where="model", advice=advice)


def _set_use_cache(model: Any) -> None:
    for settings in (model.config, model.config.get_text_config()):
        settings.use_cache = False


def _set_padding(config: RunConfig, model: Any) -> None:
    """Classifiers over decoders look for the last token that is not padding, and must know which token that is."""
    from zoray.tasks import padding_id

    padding = padding_id(load_tokenizer(config))
    for settings in (model.config, model.config.get_text_config()):
        settings.pad_token_id = padding


def _reallocate(model: nn.Module) -> None:
    """Gives every parameter and buffer memory of its own, in row-major order, at an address divisible by 64.

    Weights read by safetensors lie at any address inside the file's pages, and the last bits of a matrix product
    depend on alignment (MKL). Torch's own CPU memory is aligned to 64 bytes.
    """
    moved: dict[tuple[Any, ...], torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "cpu" or is_spilled(tensor):
            continue
        # Two parameters over the same memory are one weight, and stay so.
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() == 0 or key not in moved:
            moved[key] = tensor.detach().clone(memory_format=torch.contiguous_format)
        tensor.data = moved[key]
