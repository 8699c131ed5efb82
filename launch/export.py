"""`zoray export`: the weights of a run as a folder that `from_pretrained` loads."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

from launch.restore import restore
from zoray import stores
from zoray.config import RunConfig, TrainableLora, TrainablePrefix
from zoray.errors import RunError
from zoray.models import load_tokenizer
from zoray.models.source import find, quiet
from zoray.models.words import some
from zoray.runs import RunFolder

_LAST = {False: "config.json", True: "adapter_config.json"}
"""The file without which nothing loads what was exported: of a model, and of an adapter."""


def export(run: str, to: Path | str, step: int | None, adapter: bool, output_dir: str) -> None:
    """Write the model, its configuration and its tokenizer to a new folder, whole or not at all.

    Args:
        run: name or path of the run.
        to: the folder to make, or its URI on an object store, which gets the model's configuration last.
        step: of the weights; by default the last one.
        adapter: write the adapter of a LoRA run instead of merging it into the base model. A prefix, which cannot be
            merged, is written so in any case.
        output_dir: folder the runs are in.

    Raises:
        RunError: the folder exists and is not empty, or `adapter` is asked of a run without one.
    """
    stored = isinstance(to, str) and stores.is_uri(to)
    (_require_nothing if stored else _require_empty)(to)
    folder = RunFolder.find(run, output_dir)
    trainable = folder.config().trainable
    lora, prefix = isinstance(trainable, TrainableLora), isinstance(trainable, TrainablePrefix)
    if adapter and not (lora or prefix):
        raise RunError(f"{folder.name} has no adapter.", where="--adapter", advice="leave --adapter out")
    adapter = adapter or prefix
    restored = restore(run, step, output_dir)
    model: Any = restored.replica.model
    at, digest = restored.replica.step, restored.replica.digest()
    if lora and not adapter:
        model = model.merge_and_unload()
    _restore_cache(model, restored.config)
    tokenizer = load_tokenizer(restored.config)
    with _upload(str(to), adapter) if stored else _renamed(Path(to)) as place, quiet():
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    what = "adapter" if adapter else "model"
    text = f"{what} of step {at}, digest {digest:016x}: {stores.shown(str(to))}"
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def _require_empty(to: Path | str) -> None:
    target = Path(to).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError("The place to export to is not an empty folder.", where=str(to), advice="name another one")


@contextmanager
def _renamed(to: Path) -> Iterator[Path]:
    """A folder beside `to`, which takes its place, also that of an empty folder, at the end of the block."""
    target = to.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        raise RunError(f"The model cannot be written: {error}.", where=str(to)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _require_nothing(uri: Path | str) -> None:
    """See that there is nothing below the URI yet, and that something can be written: replay may take long."""
    try:
        found = [each.name for each in stores.entries(str(uri))]
        if not found:
            stores.check_writable(str(uri))
            return
    except stores.StoreError as error:
        raise RunError(f"{error.what}.", where="--to", advice=error.advice) from error
    whole = any(name in found for name in _LAST.values())
    raise RunError(
        f"There is something at the place to export to: {some(found)}.",
        where=stores.shown(str(uri)),
        advice="name another one" if whole else "name another one, or delete what is left there of a broken-off upload",
    )


@contextmanager
def _upload(uri: str, adapter: bool) -> Iterator[Path]:
    """A folder of this machine whose content is uploaded at the end of the block, what makes it a model last."""
    try:
        with tempfile.TemporaryDirectory(prefix="zoray-export-") as folder:
            yield Path(folder)
            stores.put(Path(folder), uri, _LAST[adapter])
    except stores.StoreError as error:
        raise RunError(
            f"The model cannot be uploaded: {error.what}.",
            where=stores.shown(uri),
            advice=f"what is there has no {_LAST[adapter]}, and is taken for none; delete it, then try again",
        ) from error
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"The model cannot be written on its way to the store: {error}.",
            where=tempfile.gettempdir(),
            advice="set TMPDIR to a folder with room for it",
        ) from error


def _restore_cache(model: Any, config: RunConfig) -> None:
    """Training switches the cache of keys and values off; the exported model generates as its base does."""
    from transformers import AutoConfig

    base = AutoConfig.from_pretrained(**find(config))
    for settings, original in ((model.config, base), (model.config.get_text_config(), base.get_text_config())):
        if hasattr(original, "use_cache"):
            settings.use_cache = original.use_cache
