"""What a tracker is, which there are, and whether they are installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, get_args

from zoray.config import RunConfig, TrackerName
from zoray.errors import ConfigError
from zoray.runs import RunFolder


class Tracker(Protocol):
    """One run as a tracker sees it.

    All calls come from one thread, in order, and may take their time. What one raises ends the tracker, not the run.
    """

    def begin(self, step: int) -> None:
        """The run starts, is resumed, or goes back: what was told of steps after this one is not true any more."""

    def log(self, step: int, values: Mapping[str, float], time: float) -> None:
        """Values at a number of committed steps; `time` in seconds since 1970."""

    def close(self, reason: str | None) -> None:
        """The run has ended: "done", "stopped", or with a fault. None: it goes on elsewhere, or may be resumed."""


_CLASSES: dict[TrackerName, str] = {"tensorboard": "TensorBoard", "mlflow": "MLflow", "wandb": "WeightsAndBiases"}


def make(name: TrackerName, folder: RunFolder, settings: Mapping[str, Any]) -> Tracker:
    """A tracker of a run; `settings` is the configuration with dotted keys.

    Raises:
        Exception: whatever its library raises.
    """
    tracker: Tracker = getattr(import_module(f"actors.trackers.{name}"), _CLASSES[name])(folder, settings)
    return tracker


def installed(name: TrackerName) -> bool:
    """Whether the package of a tracker can be imported."""
    spec = find_spec(name)
    # Trackers leave folders of their own names behind, which Python takes for packages without any code.
    return spec is not None and spec.origin is not None


def chosen(config: RunConfig) -> tuple[TrackerName, ...]:
    """The trackers a configuration asks for; of `all`, those that are installed."""
    asked = config.report_to
    if isinstance(asked, list):
        return tuple(dict.fromkeys(asked))
    if asked == "all":
        return tuple(name for name in get_args(TrackerName) if installed(name))
    return () if asked == "none" else (asked,)


def require(config: RunConfig, machine: str | None = None) -> None:
    """See that the trackers a configuration asks for are there.

    Raises:
        ConfigError: one is not installed (on that machine).
    """
    missing = [name for name in chosen(config) if not installed(name)]
    if missing:
        extras = ",".join(missing)
        raise ConfigError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
            + (f" on {machine}, where the coordinator runs." if machine else "."),
            where="report_to",
            advice=f"pip install 'zoray[{extras}]', or leave {'it' if len(missing) == 1 else 'them'} out of report_to",
        )
