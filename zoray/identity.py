"""What replicas must have in common to share a ledger, and what a ledger says of the run it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from zoray import __version__
from zoray.config import BEFORE, RunConfig, mathematics
from zoray.errors import LedgerError, RunError
from zoray.proof import Verdict
from zoray.replica import Replica
from zoray.tasks import Batch, Task

LEDGER_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Identity:
    """What a replica shows at the handshake.

    Attributes:
        version: of Zoray.
        code: digest (hex) of the sources of `zoray`, on which the numbers depend.
        config: digest (hex) of the mathematics of the configuration.
        base: digest (hex) of the base model: all of its weights and buffers, new heads and adapters included.
        layout: digest (hex) of the trainable parameters' names, shapes and dtypes, and of which of them are moved when.
        data: digest (hex) of the tokenised training data.
        verdict: the paths of the forward (see `zoray.proof`).
        objective: what the probes minimise; of a user's function, with a digest of its source.
    """

    version: str
    code: str
    config: str
    base: str
    layout: str
    data: str
    verdict: Verdict
    objective: str = "loss"

    def check(self, other: Identity, who: str) -> None:
        """Refuse a replica that computes something else.

        Raises:
            RunError: naming the first thing that differs.
        """
        words = {
            "version": "version of Zoray",
            "code": "code of Zoray",
            "config": "configuration",
            "base": "base model",
            "layout": "set of trainable parameters",
            "data": "training data",
            "verdict": "path of the forward",
            "objective": "objective",
        }
        for field, word in words.items():
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise RunError(
                    f"{who} has another {word}: {theirs}, not {mine}.",
                    where=f"handshake, {field}",
                    advice="every machine must have the same files and the same version of Zoray",
                )


def identify(replica: Replica, data: str, config: RunConfig) -> Identity:
    """The identity of a replica at step 0 whose paths have been proved."""
    assert replica.verdict is not None
    base, layout = f"{replica.base_digest():016x}", replica.directions.identity
    code, mathematics, objective = code_digest(), config_digest(config), replica.objective.identity
    return Identity(__version__, code, mathematics, base, layout, data, replica.verdict, objective)


def check_newcomer(identity: Identity, config: RunConfig, who: str) -> None:
    """Refuse a replica whose process has other code or another configuration than this one.

    Raises:
        RunError: naming what differs.
    """
    replace(identity, version=__version__, code=code_digest(), config=config_digest(config)).check(identity, who)


@cache
def code_digest() -> str:
    """Short digest (hex) of the sources of the package `zoray`."""
    found = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def config_digest(config: RunConfig) -> str:
    """Short digest (hex) of what a configuration computes."""
    return hashlib.sha256(json.dumps(mathematics(config), sort_keys=True).encode()).hexdigest()[:16]


def ledger_header(config: RunConfig, identity: Identity, task: Task) -> dict[str, Any]:
    """The header of a new ledger: everything needed to tell whether a model, a configuration or data belong to it."""
    texts = texts_of(task, config)
    return {
        "format": LEDGER_FORMAT,
        "run_seed": config.seed,
        "identity": _recorded(identity),
        "labels": {"num_labels": task.num_labels, "id2label": _string_keys(task.id2label)},
        "texts": None if texts is None else {name: values.tolist() for name, values in texts.items()},
        "mathematics": mathematics(config),
    }


def texts_of(task: Task, config: RunConfig) -> Batch | None:
    """Arguments of a forward that tells the inputs of layers in a run; None if none is needed, or random tokens do."""
    return task.texts(config.seed) if config.direction.kind == "inputs" else None


def recorded_texts(header: Mapping[str, Any]) -> Batch | None:
    """The same, of a ledger: weights are brought back without the data."""
    texts = header.get("texts")
    return texts and {name: torch.tensor(values) for name, values in texts.items()}


def own_header(header: Mapping[str, Any], identity: Identity, config: RunConfig) -> dict[str, Any]:
    """The header of a ledger of the same model and data with another configuration, and the paths proved for that."""
    return {**header, "identity": _recorded(identity), "mathematics": mathematics(config)}


def check_header(header: dict[str, Any], identity: Identity, config: RunConfig, where: str) -> None:
    """Refuse to continue a ledger with another model, data or mathematics.

    Raises:
        LedgerError: naming what differs.
    """
    old, new = {**BEFORE, **header["mathematics"]}, mathematics(config)
    for key in sorted(old.keys() | new.keys()):
        if key in old and key in new and old[key] != new[key]:
            raise LedgerError(
                f"The run was made with {key} = {old[key]!r}, not {new[key]!r}; that would change its mathematics.",
                where=f"{where}, {key}",
                advice=f"resume with {key}={old[key]}, or start a new run",
            )
    recorded, found = dict(header["identity"]), _recorded(identity)
    recorded.setdefault("objective", "loss")
    words = {"base": "base model", "layout": "set of parameters", "data": "data", "verdict": "path"}
    for field, word in {**words, "objective": "objective"}.items():
        if recorded[field] != found[field]:
            raise LedgerError(
                f"The ledger belongs to another {word}: it says {recorded[field]}, this is {found[field]}.",
                where=f"{where}, identity.{field}",
                advice="give it back the files it was made with, or start a new run",
            )


def check_base(header: dict[str, Any], replica: Replica, where: str) -> None:
    """Refuse to replay a ledger onto another base model.

    Raises:
        LedgerError: the weights or the parameters are not those the run began with.
    """
    found = {"base": f"{replica.base_digest():016x}", "layout": replica.directions.identity}
    for field, value in found.items():
        if header["identity"][field] != value:
            raise LedgerError(
                f"The ledger belongs to another model: its {field} is {header['identity'][field]}, this one's {value}.",
                where=f"{where}, identity.{field}",
                advice="give it back the model it was made with (the key `model` of the run's config.yaml)",
            )


def _recorded(identity: Identity) -> dict[str, Any]:
    """What of an identity a ledger keeps: another version of the code may go on with it."""
    facts: dict[str, Any] = json.loads(json.dumps(asdict(identity)))
    del facts["code"], facts["config"]
    return facts


def header_digest(header: dict[str, Any]) -> str:
    """Short digest (hex) of a header, to bind a snapshot to its run."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:32]


def _string_keys(names: dict[int, str] | None) -> dict[str, str] | None:
    return None if names is None else {str(key): value for key, value in names.items()}
