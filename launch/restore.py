"""Any step of a run, in this process: the base model with the ledger applied."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from torch import nn

from zoray.config import RunConfig, mathematics
from zoray.errors import LedgerError
from zoray.ledger import Ledger
from zoray.replica import Replica
from zoray.runs import RunFolder
from zoray.snapshot import replay


@dataclass(frozen=True, slots=True)
class Restored:
    """A run opened for reading, and its weights at a step."""

    folder: RunFolder
    config: RunConfig
    ledger: Ledger
    replica: Replica


def open_run(run: str, output_dir: str) -> tuple[RunFolder, RunConfig, Ledger]:
    """Folder, configuration and ledger of a run, read-only; warnings about the ledger go to standard error.

    Raises:
        RunError: there is no such run.
        LedgerError: the ledger is damaged, or config.yaml says other mathematics than it was made with.
    """
    folder = RunFolder.find(run, output_dir)
    config = folder.config()
    ledger = Ledger.open(folder.ledger, repair=False)
    for text in ledger.warnings:
        Console(stderr=True).print(f"warning: {text}", markup=False)
    recorded, found = ledger.header["mathematics"], mathematics(config)
    for key in sorted(recorded.keys() & found.keys()):
        if recorded[key] != found[key]:
            raise LedgerError(
                f"config.yaml says {key} = {found[key]!r}, the ledger was made with {recorded[key]!r}.",
                where=str(folder.config_path),
                advice="put the old value back",
            )
    return folder, config, ledger


def base_replica(config: RunConfig, ledger: Ledger) -> Replica:
    """A replica of the run's base model, at step 0.

    Raises:
        ModelError: the model cannot be loaded any more.
    """
    labels = ledger.header["labels"]
    names = labels["id2label"] and {int(key): name for key, name in labels["id2label"].items()}
    return replica_of(load(config, labels["num_labels"], names), config, int(ledger.header["run_seed"]))


def load(config: RunConfig, num_labels: int | None, id2label: dict[int, str] | None) -> nn.Module:
    """The run's base model."""
    from transformers.utils import logging

    from zoray.models import load_model

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return load_model(config, num_labels=num_labels, id2label=id2label)


def replica_of(model: nn.Module, config: RunConfig, run_seed: int) -> Replica:
    """A replica of a loaded model, with the directions and paths the configuration asks for."""
    return Replica(
        model,
        run_seed,
        direction=config.direction.kind,
        rank=config.direction.rank,
        signs=config.signs,
        head=config.head,
    )


def restore(run: str, step: int | None, output_dir: str) -> Restored:
    """A run's weights at a step (by default the last one), with the help of its snapshots.

    Raises:
        ZorayError: the run, its model or the step cannot be had.
    """
    folder, config, ledger = open_run(run, output_dir)
    replica = base_replica(config, ledger)
    replay(replica, ledger, folder.snapshots, step)
    return Restored(folder, config, ledger, replica)
