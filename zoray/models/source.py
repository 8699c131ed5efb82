"""Where a model is."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoray.config import RunConfig
from zoray.errors import ModelError
from zoray.models.fetched import fetched, listed, require_config
from zoray.models.words import reason, some
from zoray.stores import is_uri

_READ = (".json", ".safetensors", ".bin", ".model")
"""What the files of a model that are loaded end with."""


def find(config: RunConfig) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where the model is; one on an object store is downloaded.

    Asked for a name it does not have, with no network, `transformers` tries for half a minute; the hub is asked here
    instead, once.

    Raises:
        ModelError: it cannot be had.
    """
    name = str(fetched(config.model)) if is_uri(config.model) else config.model
    folder = Path(name).expanduser()
    source: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if folder.is_dir():
        found = sorted(each.name for each in folder.iterdir())
        require_config(found, str(folder))
        read = [name for name in found if name.endswith(_READ)]
        if closed := [name for name in read if not os.access(folder / name, os.R_OK)]:
            raise ModelError(
                f"User {os.geteuid()} cannot read {some(closed)} in the folder {folder}.",
                where="model",
                advice=f"Let everyone read it, `chmod -R a+rX {folder}`, or copy it again if it is a link to nowhere.",
            )
        return {**source, "pretrained_model_name_or_path": str(folder)}
    if folder.is_file():
        raise ModelError(f"{folder} is a file.", where="model", advice="Name the folder it is in.")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelError(f"There is no folder {folder}.", where="model", advice="Check the path.")
    return {**source, "pretrained_model_name_or_path": name, "local_files_only": _only_in_cache(name)}


def check(config: RunConfig) -> None:
    """As `find`, but what is on an object store stays there: for a machine that may never need it.

    Raises:
        ModelError: it cannot be had.
    """
    if is_uri(config.model):
        listed(config.model)
    else:
        find(config)


def _only_in_cache(name: str) -> bool:
    """Whether a hub model must come from the cache because the hub does not answer; ModelError if it is not there."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
        HfApi().model_info(name, timeout=10)
    except Exception as error:
        if isinstance(error, ValueError) or not cached:
            raise ModelError(
                f"{name} is neither a folder nor a model on the Hugging Face hub that can be had: {reason(error)}.",
                where="model",
                advice="Check the name, the network and (for a gated model) HF_TOKEN; or name a local folder.",
            ) from error
        return True
    return False


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no reports from the libraries: what matters in them is checked and said by this module."""
    from transformers.utils import logging

    reports: Any = logging

    level, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        reports.set_verbosity(level)
        if bars:
            reports.enable_progress_bar()
