"""The configuration of a run: one YAML file, checked before anything is loaded or started.

`load` reads a file and the command line's overrides, `dump` writes a configuration as resolved, and `changed` names the
keys in which two configurations describe a different computation.
"""

from __future__ import annotations

from zoray.config.compare import changed, mathematics, schedule_needs_max_steps
from zoray.config.estimator import DIFFERENTIATING, EstimatorName
from zoray.config.load import dump, load, with_memory
from zoray.config.optimizer import OptimizerConfig
from zoray.config.schema import RunConfig, TrackerName
from zoray.config.sections import (
    CellKind,
    DirectionConfig,
    LoraConfig,
    MemoryConfig,
    ResidentMemory,
    StreamedMemory,
    TrainableLora,
    Zero3Memory,
)
from zoray.config.tasks import CausalLMTask, ClassificationTask, TaskConfig
from zoray.config.worded import GenerationTask, MultipleChoiceTask, PromptedTask, WordedTask

__all__ = [
    "DIFFERENTIATING",
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
    "PromptedTask",
    "ResidentMemory",
    "RunConfig",
    "StreamedMemory",
    "TaskConfig",
    "TrackerName",
    "TrainableLora",
    "WordedTask",
    "Zero3Memory",
    "changed",
    "dump",
    "load",
    "mathematics",
    "schedule_needs_max_steps",
    "with_memory",
]
