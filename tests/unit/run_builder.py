"""A finished run on disk, made by driving the core directly: what a coordinator and its replicas leave, without Ray."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.conftest import SENTENCES, make_model
from zoray.aggregate import aggregate
from zoray.config import RunConfig, load
from zoray.config.yaml12 import dump_yaml
from zoray.identity import header_digest, identify, ledger_header, texts_of
from zoray.ledger import Ledger
from zoray.models import load_model, load_tokenizer, selection
from zoray.protocol import EvalSums, Evaluation
from zoray.protocol.decide import evaluation
from zoray.replica import Replica
from zoray.runs import RunFolder
from zoray.snapshot import save
from zoray.tasks import Task, batch_for, load_task


@dataclass(frozen=True)
class BuiltRun:
    """A run, and what its replicas knew at the end.

    Attributes:
        digests: digest of the weights by step, 0 to the last.
        replica: at the last step.
        evaluations: of the held-out data, by step.
    """

    folder: RunFolder
    config: RunConfig
    digests: dict[int, int]
    replica: Replica
    evaluations: dict[int, Evaluation]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def output_dir(self) -> str:
        return str(self.folder.path.parent)

    @property
    def model(self) -> nn.Module:
        return self.replica.model


def write_data(folder: Path, kind: str, rows: int = 24) -> dict[str, str]:
    """Training and held-out data of a kind of task, as JSONL; returns the keys `train` and `eval` of the task."""
    paths = {}
    for part in ("train", "eval"):
        path = folder / f"{part}.jsonl"
        lines: list[dict[str, Any]] = [{"text": SENTENCES[i % len(SENTENCES)]} for i in range(rows)]
        if kind == "classification":
            for i, line in enumerate(lines):
                line["label"] = ("bad", "good")[i % 2]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths[part] = str(path)
    return paths


def write_config(
    folder: Path, model: str = "gpt2", kind: str = "causal_lm", base: str | None = None, **keys: Any
) -> Path:
    """A model, data and a configuration file for them under a folder; `keys` override those of the configuration.

    `base`: a model there is already.
    """
    head = {"head": "classification"} if kind == "classification" else {}
    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "model": base or str(make_model(model, folder / "base", **head)),
        "task": {"kind": kind, **write_data(folder, kind), "max_length": 8, **keys.pop("task", {})},
        "max_steps": 6,
        "directions": 4,
        "per_direction_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optimizer": {"normalize": "none"},
        "output_dir": str(folder / "runs"),
        "run_name": "tiny",
        **keys,
    }
    path = folder / "tiny.yaml"
    path.write_text(dump_yaml(settings))
    return path


def build_run(
    folder: Path,
    model: str = "gpt2",
    kind: str = "causal_lm",
    *,
    digest: bool = True,
    snapshots: tuple[int, ...] = (),
    **keys: Any,
) -> BuiltRun:
    """Run all steps of `write_config`'s configuration in this process and leave the folder of a finished run.

    Args:
        folder: the base model, the data and runs/tiny come under it.
        model: kind of tiny model.
        kind: of the task.
        digest: record the digest of the last step, as a run does that ends in order.
        snapshots: steps to save snapshots of.
        keys: of the configuration.
    """
    path = write_config(folder, model, kind, **keys)
    config = load(path)
    run = RunFolder.create(config, path.stem)
    run.log.write_text("done: all steps are committed\n")
    task = load_task(config, load_tokenizer(config))
    loaded = load_model(config, num_labels=task.num_labels, id2label=task.id2label)
    kinds: dict[str, Any] = {"direction": config.direction.kind, "rank": config.direction.rank}
    kinds |= {"selection": selection(config), "texts": texts_of(task, config)}
    replica = Replica(loaded, config.seed, signs=config.signs, head=config.head, **kinds)
    replica.prove(batch_for(task, config, 0, 0, 0), config.epsilon)
    header = ledger_header(config, identify(replica, task.digest, config), task)
    digests, evaluations = {0: replica.digest()}, {0: _evaluate(run, replica, task)}
    with Ledger.create(run.ledger, header) as ledger:
        for _ in range(config.max_steps):
            _step(run, config, replica, task, ledger)
            digests[replica.step] = replica.digest()
            if replica.step in snapshots:
                save(run.snapshots_of(config), replica, ledger.head, header_digest(header))
    evaluations[replica.step] = _evaluate(run, replica, task)
    if digest:
        run.append("digests", {"step": replica.step, "digest": f"{digests[replica.step]:016x}"})
    return BuiltRun(run, config, digests, replica, evaluations)


def _step(run: RunFolder, config: RunConfig, replica: Replica, task: Task, ledger: Ledger) -> None:
    step = replica.step
    probes = [
        replica.probe(step, k, batch_for(task, config, step, k, 0), config.epsilon) for k in range(config.directions)
    ]
    decided = aggregate(
        step,
        probes,
        directions=config.directions,
        microbatches=1,
        learning_rate=config.learning_rate,
        previous=ledger.head,
    )
    ledger.append(decided.commit)
    replica.apply(decided.commit)
    rms = math.sqrt(sum(g * g for g in decided.projected_gradients) / config.directions)
    split = {"seconds": 0.25, "probe_seconds": 0.2, "commit_seconds": 0.01, "wait_seconds": 0.04}
    row = {"step": step, "loss": decided.commit.loss, "learning_rate": config.learning_rate, "gradient_rms": rms}
    run.append("steps", {**row, **split})


def _evaluate(run: RunFolder, replica: Replica, task: Task) -> Evaluation:
    shards = [EvalSums(*replica.evaluate(task.eval_batch(shard)).summary()) for shard in range(task.eval_shards)]
    found = evaluation(shards)
    row = {"loss": found.loss, "standard_error": found.standard_error, "count": found.count, "correct": found.correct}
    run.append("evaluations", {"step": replica.step, **row})
    return found


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all weights by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
