"""From the section `memory` of a configuration to a loaded model and the memory that holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from zoray.config import RunConfig, StreamedMemory, Zero3Memory
from zoray.directions import Directions
from zoray.memory.base import Memory
from zoray.memory.resident import Resident
from zoray.memory.scratch import claim
from zoray.models.blank import blank_model
from zoray.models.load import load_model

Make = Callable[[nn.Module, Directions], Memory]
"""What `Replica` wants of a memory."""


def load_placed(
    config: RunConfig, name: str, *, num_labels: int | None = None, id2label: Mapping[int, str] | None = None
) -> tuple[nn.Module, Make]:
    """Load a model as the configuration has it: whole, or straight into the parts that are this process's.

    For a sharded memory the processes must have formed their world (`zoray.memory.world`), and all of them do this.

    Args:
        config: of the run.
        name: of the replica; files for offloaded weights are named after it.
        num_labels, id2label: see `load_model`.

    Returns:
        The model, on the device it computes on, and what makes its memory.

    Raises:
        ConfigError: a library is missing, or there is no place for files, or see `load_model`.
        ModelError: see `load_model`.
    """
    if isinstance(config.memory, Zero3Memory):
        from zoray.memory.zero3 import Sharding, Zero3, partitioned_loading

        chosen = config.memory
        files = {}
        if chosen.nvme_path is not None:
            files = {"folder": claim(chosen.nvme_path, name), "buffer": _largest(config) // chosen.shards + 1}
        sharding = Sharding(chosen.offload, **files)  # type: ignore[arg-type]
        with partitioned_loading(getattr(torch, config.dtype), sharding):
            model = load_model(config, num_labels=num_labels, id2label=id2label)
        return model, lambda model, directions: Zero3(model, directions, sharding)
    if isinstance(config.memory, StreamedMemory):
        from zoray.memory.spill import streamed_loading
        from zoray.memory.streamed import Streamed, Streaming

        place = None if config.memory.nvme_path is None else claim(config.memory.nvme_path, name)
        streaming = Streaming(config.memory.offload, place, "cuda" if config.gpus_per_replica > 0 else "cpu")
        with streamed_loading(streaming):
            model = load_model(config, num_labels=num_labels, id2label=id2label)
        return model, lambda model, directions: Streamed(model, directions, streaming)
    model = load_model(config, num_labels=num_labels, id2label=id2label)
    if config.gpus_per_replica > 0:
        model.to("cuda")
    return model, Resident


def _largest(config: RunConfig) -> int:
    """Weights of the largest parameter."""
    return max(parameter.numel() for parameter in blank_model(config).parameters())
