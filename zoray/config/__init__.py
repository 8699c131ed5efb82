"""The configuration of a run: one YAML file, checked before anything is loaded or started.

`load` reads a file and the command line's overrides, `dump` writes a configuration as resolved, and `changed` names the
keys in which two configurations describe a different computation.
"""

from __future__ import annotations

from zoray.config.compare import BEFORE, changed, mathematics, schedule_needs_max_steps
from zoray.config.estimator import DIFFERENTIATING, EstimatorName
from zoray.config.load import dump, load, with_memory
from zoray.config.optimizer import OptimizerConfig
from zoray.config.schema import RunConfig, TrackerName
from zoray.config.sections import (
    CellKind,
    DirectionConfig,
    MemoryConfig,
    ResidentMemory,
    StreamedMemory,
    Zero3Memory,
)
from zoray.config.tasks import CausalLMTask, ClassificationTask, TaskConfig
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
from zoray.config.worded import GenerationTask, MultipleChoiceTask, PromptedTask, WordedTask

__all__ = [
    "BEFORE",
    "BIAS_AND_NORM",
    "DIFFERENTIATING",
    "BlocksConfig",
    "CausalLMTask",
    "CellKind",
    "ClassificationTask",
    "DirectionConfig",
    "EstimatorName",
    "GenerationTask",
    "LoraConfig",
    "MemoryConfig",
    "MultipleChoiceTask",
    "OptimizerConfig",
    "PrefixConfig",
    "PromptedTask",
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
    "WordedTask",
    "Zero3Memory",
    "changed",
    "dump",
    "load",
    "mathematics",
    "schedule_needs_max_steps",
    "with_memory",
]
