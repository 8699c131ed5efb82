"""Tasks: from files of text to the batch of a probe.

`load_task` tokenises (once per machine) and opens the data; `batch_for` gives the batch of a probe, a pure function of
its address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoray.config import CausalLMTask, GenerationTask, MultipleChoiceTask, PromptedTask, RunConfig
from zoray.tasks.base import IGNORED_LABEL, Batch, Task, padding_id
from zoray.tasks.sampler import sample_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED_LABEL", "Batch", "Task", "batch_for", "load_task", "padding_id", "sample_ids"]


def load_task(config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, final: bool = False) -> Task:
    """Opens the task of a configuration, tokenising its data if no process on this machine has done so before.

    Args:
        final: evaluate on `task.eval`, also where the run itself evaluates on `task.dev_samples`.

    Raises:
        DataError: data that are missing, empty, malformed or do not fit the task.
        ConfigError: a function of `objective` that cannot be imported.
    """
    from zoray.tasks.candidates import CandidatesTask
    from zoray.tasks.causal_lm import CausalLM
    from zoray.tasks.classification import Classification
    from zoray.tasks.generation import Generation

    if isinstance(config.task, PromptedTask | MultipleChoiceTask):
        return CandidatesTask(config, tokenizer, final)
    if isinstance(config.task, GenerationTask):
        return Generation(config, tokenizer, final)
    return CausalLM(config, tokenizer) if isinstance(config.task, CausalLMTask) else Classification(config, tokenizer)


def batch_for(task: Task, config: RunConfig, step: int, direction: int, microbatch: int) -> Batch:
    """The batch of the probe (step, direction, microbatch), of `per_direction_batch_size` rows.

    Neighbouring directions have the same one, `directions_per_batch` at a time.
    """
    # Batches are counted, not directions: otherwise the examples of those that have no batch would be skipped.
    ids = sample_ids(
        config.seed,
        task.train_size,
        step,
        direction // config.directions_per_batch,
        microbatch,
        directions=config.batches_of(config.most_directions),
        microbatches=config.microbatches,
        batch_size=config.per_direction_batch_size,
    )
    return task.batch(ids)
