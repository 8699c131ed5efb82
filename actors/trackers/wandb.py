"""Weights & Biases: a run of the project `WANDB_PROJECT` names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import wandb

from zoray.runs import RunFolder

_STEP = "train/global_step"
"""What Hugging Face's trainer calls the number of steps there."""


class WeightsAndBiases:
    """The run's id is in its folder, so that a resumed run goes on there.

    Its own step only ever grows, so the number of steps is a value beside the others, as in Hugging Face's trainer: a
    step that is computed again is one more row.
    """

    def __init__(self, folder: RunFolder, settings: Mapping[str, Any]) -> None:
        self._folder, self._settings = folder, dict(settings)
        self._run: Any = None

    def begin(self, step: int) -> None:
        """Find the run, or make it."""
        if self._run is not None:
            return
        known = self._folder.read_tracker("wandb").get("id")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "zoray"),
            id=known,
            resume="allow" if known else None,
            name=self._folder.name,
            dir=os.environ.get("WANDB_DIR", str(self._folder.path)),
            config=self._settings,
            allow_val_change=True,
            # What the coordinator's process says is Ray's affair.
            settings=wandb.Settings(console="off"),
        )
        self._folder.write_tracker("wandb", {"id": self._run.id, "url": self._run.url})
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP, step_sync=True)

    def log(self, step: int, values: Mapping[str, float], time: float) -> None:
        """One row."""
        self._run.log({**values, _STEP: step})

    def close(self, reason: str | None) -> None:
        """Send what is left."""
        if self._run is not None:
            self._run.finish(exit_code=0 if reason in ("done", "stopped", None) else 1)
