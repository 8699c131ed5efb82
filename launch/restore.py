"""Any step of a run, in this process: the base model with the ledger applied.

Torch is imported late: reading a ledger does without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from zoray.config import BEFORE, RunConfig, mathematics
from zoray.errors import LedgerError, RunError
from zoray.ledger import Ledger
from zoray.runs import RunFolder

if TYPE_CHECKING:
    from torch import nn

    from zoray.replica import Replica
    from zoray.tasks import Batch


@dataclass(frozen=True, slots=True)
class Restored:
    """A run opened for reading, and its weights at a step."""

    folder: RunFolder
    config: RunConfig
    ledger: Ledger
    replica: Replica


def open_run(run: str, output_dir: str) -> tuple[RunFolder, RunConfig, Ledger]:
    """Folder, configuration and ledger of a run, read-only; warnings go to standard error.

    Raises:
        RunError: there is no such run, or it has no ledger.
        LedgerError: the ledger is damaged, or config.yaml says other mathematics than it was made with.
    """
    folder = RunFolder.find(run, output_dir)
    config = folder.config()
    ledger = open_ledger(folder)
    _compare(folder, config, ledger)
    return folder, config, ledger


def open_ledger(folder: RunFolder) -> Ledger:
    """The ledger of a run, read-only; its warnings go to standard error.

    Raises:
        RunError: the run has none.
        LedgerError: it is damaged.
    """
    folder.require_ledger()
    ledger = Ledger.open(folder.ledger, repair=False)
    for text in ledger.warnings:
        warn(text)
    return ledger


def _compare(folder: RunFolder, config: RunConfig, ledger: Ledger) -> None:
    """Refuse a config.yaml that was edited to other mathematics than the ledger's."""
    recorded, found = {**BEFORE, **ledger.header["mathematics"]}, mathematics(config)
    # A key that only one of them has (`trainable.lora.r`) follows from one that both have, where there is one.
    for key in [*sorted(recorded.keys() & found.keys()), *sorted(recorded.keys() - found.keys())]:
        if key in found and recorded[key] == found[key]:
            continue
        says = f"config.yaml says {key} = {found[key]!r}" if key in found else f"config.yaml has no {key}"
        text = f"{says}, the ledger was made with {recorded[key]!r}."
        raise LedgerError(text, where=str(folder.config_path), advice="put the old value back")


def warn(text: str) -> None:
    """Say something on standard error that does not end the command."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"warning: {text}", markup=False)


def base_replica(config: RunConfig, ledger: Ledger) -> Replica:
    """A replica of the run's base model, at step 0.

    Raises:
        ModelError: the model cannot be loaded any more.
    """
    from zoray.identity import recorded_texts

    labels = ledger.header["labels"]
    names = labels["id2label"] and {int(key): name for key, name in labels["id2label"].items()}
    model, seed = load(config, labels["num_labels"], names), int(ledger.header["run_seed"])
    return replica_of(model, config, seed, recorded_texts(ledger.header))


def load(config: RunConfig, num_labels: int | None, id2label: dict[int, str] | None) -> nn.Module:
    """The run's base model."""
    from transformers.utils import logging

    from zoray.models import load_model

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return load_model(config, num_labels=num_labels, id2label=id2label)


def replica_of(model: nn.Module, config: RunConfig, run_seed: int, texts: Batch | None) -> Replica:
    """A replica of a loaded model, with the directions and paths the configuration asks for.

    Args:
        texts: that the run's inputs of layers were found with, where they were not random tokens.
    """
    from zoray.models import selection
    from zoray.replica import Replica

    return Replica(
        model,
        run_seed,
        direction=config.direction.kind,
        rank=config.direction.rank,
        texts=texts,
        signs=config.signs,
        head=config.head,
        selection=selection(config),
    )


def restore(run: str, step: int | None, output_dir: str) -> Restored:
    """A run's weights at a step (by default the last one), with the help of its snapshots.

    Raises:
        ZorayError: the run, its model or the step cannot be had.
    """
    folder, config, ledger = open_run(run, output_dir)
    if step is not None and not 0 <= step <= ledger.next_step:
        # Replay says so too, but only after the model is loaded.
        raise RunError(
            f"The run has no step {step}.", where=str(ledger.path), advice=f"give a step from 0 to {ledger.next_step}"
        )
    from zoray.snapshot import replay

    replica = base_replica(config, ledger)
    replay(replica, ledger, folder.snapshots_of(config), step)
    return Restored(folder, config, ledger, replica)
