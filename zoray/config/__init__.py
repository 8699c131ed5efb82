"""The configuration of a run: one YAML file, checked before anything is loaded or started.

`load` reads a file and the command line's overrides, `dump` writes a configuration as resolved, and `changed` names the
keys in which two configurations describe a different computation.
"""

from __future__ import annotations

from zoray.config.compare import changed, mathematics, schedule_needs_max_steps
from zoray.config.load import dump, load, with_memory
from zoray.config.schema import RunConfig, TrackerName
from zoray.config.sections import (
    CausalLMTask,
    ClassificationTask,
    DirectionConfig,
    MemoryConfig,
    ResidentMemory,
    StreamedMemory,
    TaskConfig,
    Zero3Memory,
)
from zoray.config.trainable import (
    BIAS_AND_NORM,
    BlocksConfig,
    LoraConfig,
    PrefixConfig,
    SparseConfig,
    Trainable,
    TrainableBlocks,
    TrainableLora,
    TrainablePrefix,
    TrainableSparse,
)

__all__ = [
    "BIAS_AND_NORM",
    "BlocksConfig",
    "CausalLMTask",
    "ClassificationTask",
    "DirectionConfig",
    "LoraConfig",
    "MemoryConfig",
    "PrefixConfig",
    "ResidentMemory",
    "RunConfig",
    "SparseConfig",
    "StreamedMemory",
    "TaskConfig",
    "TrackerName",
    "Trainable",
    "TrainableBlocks",
    "TrainableLora",
    "TrainablePrefix",
    "TrainableSparse",
    "Zero3Memory",
    "changed",
    "dump",
    "load",
    "mathematics",
    "schedule_needs_max_steps",
    "with_memory",
]
