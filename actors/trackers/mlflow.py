"""MLflow: a run of an experiment on the server `MLFLOW_TRACKING_URI` names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from zoray import __version__
from zoray.runs import RunFolder

_BATCH = 100
"""Parameters MLflow takes at once."""

_LONGEST = 250
"""Characters of a parameter that every version of MLflow takes."""

_STATUS = {"done": "FINISHED", "stopped": "KILLED"}


class MLflow:
    """The run's id at the server is in its folder, so that a resumed run goes on there.

    MLflow cannot forget: steps that are computed again have two values each, of which it takes the later for the last.
    """

    def __init__(self, folder: RunFolder, settings: Mapping[str, Any]) -> None:
        self._folder, self._settings = folder, settings
        self._client = MlflowClient()
        self._id: str | None = None

    def begin(self, step: int) -> None:
        """Find the run at the server, or make it."""
        if self._id is not None:
            return
        # Without the password that it may have: the folder is read by many.
        server = re.sub(r"://[^/\s@]+@", "://", mlflow.get_tracking_uri())
        known = self._folder.read_tracker("mlflow")
        if known.get("server") == server:
            self._id = known["run_id"]
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"zoray.version": __version__, "mlflow.source.name": "zoray"}
        made = self._client.create_run(self._experiment(), run_name=self._folder.name, tags=tags)
        self._id = made.info.run_id
        self._folder.write_tracker("mlflow", {"server": server, "run_id": self._id})
        params = [Param(key, str(value)[:_LONGEST]) for key, value in self._settings.items()]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(self._id, params=params[start : start + _BATCH])

    def log(self, step: int, values: Mapping[str, float], time: float) -> None:
        """All values in one request."""
        assert self._id is not None
        metrics = [Metric(name, value, int(1000 * time), step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, reason: str | None) -> None:
        """Say how the run has ended."""
        if self._id is not None and reason is not None:
            self._client.set_terminated(self._id, _STATUS.get(reason, "FAILED"))

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if name is None:
            return os.environ.get("MLFLOW_EXPERIMENT_ID", "0")
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found is not None else str(self._client.create_experiment(name))
