"""A model without weights: names, shapes and dtypes of its parameters, from its config.json alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from zoray import stores
from zoray.config import ClassificationTask, RunConfig, TrainableLora, TrainablePrefix
from zoray.errors import ModelError
from zoray.models.fetched import listed
from zoray.models.load import AUTO, explain, require_kind
from zoray.models.prefix import add_prefix
from zoray.models.source import find, quiet
from zoray.models.trainable import add_adapters, chosen, select

_ENOUGH = "Its config.json is enough here, in a folder that `model` names."


def blank_model(config: RunConfig, num_labels: int | None = None) -> nn.Module:
    """The model that `load_model` would load, on the device "meta": its tensors have shapes and no memory.

    A new classification head and adapters are made too. Of a model on an object store or the hub, no weights are
    downloaded.

    Args:
        config: `model`, `dtype`, `attn_implementation`, `task.kind` and `trainable` decide.
        num_labels: classes, for a classification; by default what `task.num_labels` or else config.json says.

    Raises:
        ModelError: there is no config.json, it is of an unknown architecture or not of the kind the task needs, or its
            weights are quantised, so that the architecture does not tell their size.
        ConfigError: `trainable` matches nothing.
    """
    with _described(config) as source, torch.random.fork_rng(devices=[]), quiet(), torch.device("meta"):
        made, new = _from_config(config, source, num_labels)
        model: nn.Module = made
        if isinstance(config.trainable, TrainableLora):
            model = add_adapters(model, config.trainable.lora, config, new)
            for parameter in model.parameters():
                # On this device peft leaves its own in float32.
                parameter.data = parameter.data.to(getattr(torch, config.dtype))
        elif isinstance(config.trainable, TrainablePrefix):
            model = add_prefix(model, config.trainable.prefix, config, new)
    if (words := chosen(config)) is not None:
        select(model, *words, new)
    return model.eval()


def _from_config(config: RunConfig, source: dict[str, Any], num_labels: int | None) -> tuple[Any, list[str]]:
    """The model, and the names of the parameters that a checkpoint of that architecture would not have."""
    import transformers

    if num_labels is None and isinstance(config.task, ClassificationTask):
        num_labels = config.task.num_labels
    labels: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    classifies = config.task.architecture == "classifier"
    auto: Any = getattr(transformers, AUTO[config.task.architecture])
    attention = {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    try:
        settings = transformers.AutoConfig.from_pretrained(**source, **labels)
        require_kind(config, settings, auto)
        _require_plain(config, settings)
        code = {"trust_remote_code": config.trust_remote_code}
        model = auto.from_config(settings, dtype=getattr(torch, config.dtype), **code, **attention)
    except ModelError:
        raise
    except Exception as error:
        raise explain(config, num_labels, error) from error
    for each in (model.config, model.config.get_text_config()):
        each.use_cache = False
        if classifies and each.pad_token_id is None:
            each.pad_token_id = 0
    if not classifies or type(model).__name__ in (settings.architectures or ()):
        return model, []
    body = f"{model.base_model_prefix}."
    return model, [name for name, _ in model.named_parameters() if not name.startswith(body)]


def _require_plain(config: RunConfig, settings: Any) -> None:
    if getattr(settings, "quantization_config", None):
        raise ModelError(
            f"The weights of {config.model} are quantised: its architecture does not tell how large they are.",
            where="model",
            advice="Name the model that it was made from.",
        )


@contextmanager
def _described(config: RunConfig) -> Iterator[dict[str, Any]]:
    """The arguments of `from_pretrained` that say where the model's description is; no weights are fetched for it."""
    with TemporaryDirectory() as folder:
        try:
            source = _fetched(config, Path(folder)) if stores.is_uri(config.model) else find(config)
        except ModelError as error:
            raise ModelError(error.what, where=error.where, advice=f"{error.advice or ''} {_ENOUGH}".strip()) from error
        yield source


def _fetched(config: RunConfig, folder: Path) -> dict[str, Any]:
    names = [
        each.name for each in listed(config.model) if each.name.endswith((".json", ".py")) and "/" not in each.name
    ]
    try:
        stores.fetch(config.model, names, folder)
    except stores.StoreError as error:
        raise ModelError(f"{error.what}.", where="model", advice=error.advice) from error
    return {"pretrained_model_name_or_path": str(folder), "trust_remote_code": config.trust_remote_code}
