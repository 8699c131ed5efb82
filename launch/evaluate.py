"""`zoray eval`: the held-out loss of a run's weights, in this process, on an accelerator where the run had some."""

from __future__ import annotations

import json

import torch
from rich.console import Console

from launch.progress import evaluated
from launch.restore import restore
from zoray.errors import ConfigError
from zoray.models import load_tokenizer
from zoray.protocol import EvalSums
from zoray.protocol.decide import evaluation
from zoray.replica import Replica
from zoray.tasks import Batch, Task, batch_for, load_task

_CPU = torch.device("cpu")


def evaluate(run: str, step: int | None, as_json: bool, output_dir: str) -> None:
    """Print the mean loss over the held-out examples, its standard error, and the accuracy of a classification.

    Raises:
        ConfigError: the run has no held-out data.
    """
    restored = restore(run, step, output_dir)
    config, replica = restored.config, restored.replica
    task = load_task(config, load_tokenizer(config), final=True)
    replica.objective = task.objective
    if not task.eval_shards:
        raise ConfigError(
            "The run has no held-out data.", where=f"{restored.folder.config_path}, task.eval", advice="name some there"
        )
    torch.set_num_threads(config.threads_per_replica)
    device = torch.device("cuda" if config.gpus_per_replica and torch.cuda.is_available() else "cpu")
    replica.model.to(device)
    replica.prove(_on(device, batch_for(task, config, 0, 0, 0)), config.epsilon)
    result = evaluation([evaluate_shard(replica, task, shard, device) for shard in range(task.eval_shards)])
    if as_json:
        row = {"step": replica.step, "loss": result.loss, "standard_error": result.standard_error}
        print(json.dumps({**row, "count": result.count, "correct": result.correct, "score": result.score}))
        return
    text = f"step {replica.step}: held-out loss {evaluated(result)} over {result.count} examples"
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def evaluate_shard(replica: Replica, task: Task, shard: int, device: torch.device = _CPU) -> EvalSums:
    """Sums over one batch of the evaluation, as a replica sends them."""
    rows = replica.evaluate(_on(device, task.eval_batch(shard)))
    return EvalSums(*rows.summary())


def _on(device: torch.device, batch: Batch) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}
