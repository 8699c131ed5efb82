"""`zoray export`: the weights of a run as a folder that `from_pretrained` loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.restore import restore
from zoray.config import TrainableLora
from zoray.errors import RunError
from zoray.models import load_tokenizer


def export(run: str, to: Path, step: int | None, adapter: bool, output_dir: str) -> None:
    """Write the model, its configuration and its tokenizer to a new folder, whole or not at all.

    Args:
        run: name or path of the run.
        to: the folder to make.
        step: of the weights; by default the last one.
        adapter: write the adapter of a LoRA run instead of merging it into the base model.
        output_dir: folder the runs are in.

    Raises:
        RunError: the folder exists and is not empty, or `adapter` is asked of a run without one.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError("The folder to export to is not empty.", where=str(to), advice="name another one")
    restored = restore(run, step, output_dir)
    lora = isinstance(restored.config.trainable, TrainableLora)
    if adapter and not lora:
        raise RunError(f"{restored.folder.name} has no adapter.", where="--adapter", advice="leave --adapter out")
    model: Any = restored.replica.model
    at, digest = restored.replica.step, restored.replica.digest()
    if lora and not adapter:
        model = model.merge_and_unload()
    _restore_cache(model, restored.config.model)
    temporary = to.absolute().with_name(f".{to.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        load_tokenizer(restored.config).save_pretrained(temporary)
        if to.exists():
            to.rmdir()
        temporary.rename(to)
    except OSError as error:
        raise RunError(f"The model cannot be written: {error}.", where=str(to)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    what = "adapter" if adapter else "model"
    Console(highlight=False, soft_wrap=True).print(f"{what} of step {at}, digest {digest:016x}: {to}", markup=False)


def _restore_cache(model: Any, source: str) -> None:
    """Training switches the cache of keys and values off; the exported model generates as its base does."""
    from transformers import AutoConfig

    original = getattr(AutoConfig.from_pretrained(source), "use_cache", None)
    if original is not None:
        model.config.use_cache = original
