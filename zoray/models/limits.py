"""What a model can take: sequence lengths and tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from zoray.config import RunConfig, TrainablePrefix
from zoray.errors import ConfigError, ModelError
from zoray.partitioned import shape_of

if TYPE_CHECKING:
    from zoray.tasks import Task


def check_lengths(config: RunConfig, model: nn.Module) -> None:
    """Raises ConfigError if `task.max_length`, and a prefix, are more than the model has positions for."""
    limit = max_positions(model)
    if limit is not None and isinstance(config.trainable, TrainablePrefix):
        limit -= config.trainable.prefix.num_virtual_tokens
    if limit is not None and config.task.max_length > limit:
        raise ConfigError(
            f"task.max_length is {config.task.max_length}, but {config.model} takes at most {limit} tokens.",
            where="task.max_length",
            advice=f"Set task.max_length to {limit} or less.",
        )


def check_tokens(task: Task, model: nn.Module) -> None:
    """Raises ModelError if the data have tokens the model has no embedding for: it is another model's tokenizer."""
    rows = shape_of(model.get_input_embeddings().weight)[0]  # type: ignore[operator]
    if task.largest_token >= rows:
        raise ModelError(
            f"The tokenizer makes token {task.largest_token}, but the model has embeddings for {rows} tokens.",
            where="model",
            advice="Use the tokenizer the model was made with, or resize its embeddings.",
        )


def max_positions(model: nn.Module) -> int | None:
    """The longest sequence the model takes, in tokens; None if its configuration sets no limit."""
    config: Any = model.config
    text_config = config.get_text_config()
    declared = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(declared, int) or declared <= 0:
        return None
    # RoBERTa's family counts positions from behind the padding token's, so some rows of the table are never used.
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            declared = min(declared, module.num_embeddings - module.padding_idx - 1)
    return declared
