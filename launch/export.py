"""`zoray export`: the weights of a run as a folder that `from_pretrained` loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

from launch.restore import restore
from zoray.config import RunConfig, TrainableLora
from zoray.errors import RunError
from zoray.models import load_tokenizer
from zoray.models.source import find, quiet
from zoray.runs import RunFolder


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
    target = to.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError("The place to export to is not an empty folder.", where=str(to), advice="name another one")
    folder = RunFolder.find(run, output_dir)
    lora = isinstance(folder.config().trainable, TrainableLora)
    if adapter and not lora:
        raise RunError(f"{folder.name} has no adapter.", where="--adapter", advice="leave --adapter out")
    restored = restore(run, step, output_dir)
    model: Any = restored.replica.model
    at, digest = restored.replica.step, restored.replica.digest()
    if lora and not adapter:
        model = model.merge_and_unload()
    _restore_cache(model, restored.config)
    tokenizer = load_tokenizer(restored.config)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        with quiet():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        # Takes the place of an empty folder, too.
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        raise RunError(f"The model cannot be written: {error}.", where=str(to)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    what = "adapter" if adapter else "model"
    Console(highlight=False, soft_wrap=True).print(f"{what} of step {at}, digest {digest:016x}: {to}", markup=False)


def _restore_cache(model: Any, config: RunConfig) -> None:
    """Training switches the cache of keys and values off; the exported model generates as its base does."""
    from transformers import AutoConfig

    base = AutoConfig.from_pretrained(**find(config))
    for settings, original in ((model.config, base), (model.config.get_text_config(), base.get_text_config())):
        if hasattr(original, "use_cache"):
            settings.use_cache = original.use_cache
