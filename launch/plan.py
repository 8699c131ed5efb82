"""`zoray plan`: what a run will need, said before anything is loaded, and what would fit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from launch.progress import size
from zoray.config import (
    DIFFERENTIATING,
    ClassificationTask,
    GenerationTask,
    MultipleChoiceTask,
    RunConfig,
    load,
    mathematics,
)
from zoray.errors import ConfigError, ResourceError
from zoray.planning import Change, Fit, Machine, Place, Plan, Planner, storage

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def plan(
    config: str,
    overrides: Sequence[str],
    device_memory: str | None,
    host_memory: str | None,
    devices: int | None,
    as_json: bool,
) -> None:
    """Print what each process of a replica will need, how many replicas a machine holds, and what would fit.

    Args:
        config: the run's YAML file.
        overrides: keys to change.
        device_memory: of each accelerator, such as 80GiB; by default what those of this machine have.
        host_memory: of a machine; by default what is free on this one.
        devices: accelerators of a machine.
        as_json: one JSON object instead of words.

    Raises:
        ConfigError, ModelError: the configuration is wrong, or the model cannot be described.
        ResourceError: not one replica fits; the error says what would.
    """
    run = load(config, overrides)
    machine = _machine(device_memory, host_memory, devices)
    planner = Planner(run)
    made = planner.plan()
    fit = made.fit(machine)
    console = Console(highlight=False, soft_wrap=True)
    if not as_json:
        _print(console, made, machine, fit)
    # Looking for them takes a while.
    changes = [] if fit.replicas else planner.changes(machine)
    if as_json:
        print(json.dumps(_facts(made, machine, fit, changes)))
    elif changes:
        _print_changes(console, run, machine, changes)
    if not fit.replicas:
        raise ResourceError(
            f"Not one replica fits: {'; '.join(fit.missing)}.",
            where="memory",
            advice=f"add {' '.join(_quoted(changes[0]))}" if changes else "use larger machines, or a smaller model",
        )


def _machine(device_memory: str | None, host_memory: str | None, devices: int | None) -> Machine:
    """The machine that is asked about; what is not said of it is as here."""
    import torch

    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = min((torch.cuda.get_device_properties(i).total_memory for i in range(here)), default=0)
    if device_memory is not None:
        device, here = _bytes(device_memory, "--device-memory"), here or 1
    count = devices if devices is not None else here
    if count and not device:
        raise ConfigError(
            "Accelerators are given, but not what memory they have, and there is none here to ask.",
            where="--devices-per-machine",
            advice="Say --device-memory 80GiB too.",
        )
    free: int = psutil.virtual_memory().available
    return Machine(free if host_memory is None else _bytes(host_memory, "--host-memory"), device, count)


def _bytes(text: str, option: str) -> int:
    """Bytes of an amount such as 80GiB, 80Gi or 80GB."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is not an amount of memory.", where=option, advice="Write it as in 80GiB.")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))


def _assumed(made: Plan) -> list[str]:
    """What was taken for granted."""
    config = made.config
    lines = [f"batches are as wide as task.max_length, {config.task.max_length} tokens; narrower ones take less"]
    if isinstance(config.task, ClassificationTask) and config.task.num_labels is None:
        lines.append("as many classes as the model's config.json says, since task.num_labels is left to the data")
    if isinstance(config.task, MultipleChoiceTask) and isinstance(config.task.choices, str):
        lines.append("every example has two choices, since their number is left to the data")
    if isinstance(config.task, GenerationTask):
        lines.append("generated text is left out: its cache of keys and values takes more the longer the prompts are")
    if "auto" in (config.proved_signs, config.head):
        lines.append("the first batch proves the paths that the model's structure allows (`signs`, `head`: auto)")
    if config.gpus_per_replica:
        lines.append("an accelerator's context and libraries take 0.5 GiB; its kernels what those of a processor do")
    return lines


_FORWARDS = {
    "one_sided": "one forward, beside one at the weights that the directions on a batch share, each",
    "forward_gradient": "one forward with derivatives",
    "backprop": "a forward and a backward",
}


def _paths(made: Plan) -> str:
    config, verdict = made.config, made.work.verdict
    rows = config.per_direction_batch_size * config.task.rows_per_example(held_out=not config.differentiable)
    forwards = f"{_FORWARDS.get(config.estimator, 'two forwards')} of {rows} rows"
    if verdict.batched:
        forwards = f"both signs in one forward of {2 * rows} rows"
    head = "; the head in slices" if verdict.chunked and config.estimator not in DIFFERENTIATING else ""
    return f"{forwards} of {config.task.max_length} tokens{head}"


def _print(console: Console, made: Plan, machine: Machine, fit: Fit) -> None:
    config, work = made.config, made.work
    weights = sum(count for count, *_ in work.parameters)
    trained = sum(count for count, _, own in work.parameters if own)
    console.print(f"{config.model}: {weights:,} weights in {config.dtype}, {trained:,} trained", markup=False)
    console.print(f"  {'probe':<10} {_paths(made)}", markup=False)
    console.print(f"  {'memory':<10} {_words(config)}", markup=False)
    (console if console.is_terminal else Console(width=160)).print(_table(made), "")
    for name, stored in storage(config, work).items():
        where = config.snapshot_dir if name == "snapshots" and config.snapshot_dir else f"{config.output_dir}/RUN"
        console.print(f"  {name:<10} {size(stored)} in {where}", markup=False)
    console.print(f"  {'machine':<10} {_holds(made, machine, fit)}", markup=False)
    for line in _assumed(made):
        console.print(f"  {'assumed':<10} {line}", markup=False)


def _print_changes(console: Console, config: RunConfig, machine: Machine, changes: list[Change]) -> None:
    console.print("\nWhat would fit:", markup=False)
    for change in changes:
        count = change.plan.fit(machine).replicas
        note = "; another run: its result is not the same" if _changes_result(config, change) else ""
        console.print(f"  {' '.join(_quoted(change))}", markup=False)
        console.print(f"      {_replicas(count)} a machine{note}", markup=False)


def _words(config: RunConfig) -> str:
    settings = config.memory.model_dump(exclude_none=True)
    kind = settings.pop("kind")
    rest = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"{kind}{': ' if rest else ''}{rest}"


def _table(made: Plan) -> Table:
    """What one process needs, by what for and where."""
    places = {"accelerator": made.need.device, "machine's memory": made.need.host}
    places = {name: place for name, place in places.items() if place.lasting}
    table = Table("each process needs", box=None)
    for column in (*places, *(["files"] if made.need.files else [])):
        table.add_column(column, justify="right")
    files = made.need.files

    def row(name: str, sizes: list[int | None], file: int | None = None, style: str | None = None) -> None:
        cells = [size(each) if each else "-" for each in (*sizes, *([file] if files else []))]
        table.add_row(name, *cells, style=style)

    for name in dict.fromkeys([*(n for place in places.values() for n in place.lasting), *files]):
        row(name, [place.lasting.get(name) for place in places.values()], files.get(name))
    for name in dict.fromkeys(n for place in places.values() for n in place.passing):
        row(f"+ {name}, for a time", [place.passing.get(name) for place in places.values()])
    row("at most", [place.peak for place in places.values()], sum(files.values()), style="bold")
    if made.need.mapped:
        table.caption = f"and {size(made.need.mapped)} of the checkpoint's pages while it loads, if there is room"
        table.caption_justify = "left"
    return table


def _holds(made: Plan, machine: Machine, fit: Fit) -> str:
    """What a machine has, how many replicas it holds, and how many such the run needs."""
    _, most, wanted = made.config.replica_limits
    has = f"{size(machine.host)} of memory"
    if machine.devices:
        has += f", {machine.devices} x {size(machine.device)} of accelerators"
    if not fit.replicas:
        return f"{has}: not one replica fits"
    needed = math.ceil(wanted / fit.replicas)
    upto = "up to " if most is not None else ""
    machines = "1 such machine" if needed == 1 else f"{needed} such machines"
    fits = "fits" if fit.replicas == 1 else "fit"
    return f"{has}: {_replicas(fit.replicas)} {fits}; the run's {upto}{wanted} need {machines}"


def _replicas(count: int) -> str:
    return f"{count} replica{'' if count == 1 else 's'}"


def _quoted(change: Change) -> list[str]:
    """Arguments as a shell wants them."""
    words = (word.partition("=") for word in change.words)
    return [f"{key}='{value}'" if set(value) & set(" {}") else f"{key}={value}" for key, _, value in words]


def _changes_result(config: RunConfig, change: Change) -> bool:
    return mathematics(config) != mathematics(change.plan.config)


def _facts(made: Plan, machine: Machine, fit: Fit, changes: list[Change]) -> dict[str, Any]:
    """All of it for `--json`; sizes in bytes."""
    config, work, need = made.config, made.work, made.need

    def place(of: Place) -> dict[str, Any]:
        return {"lasting": dict(of.lasting), "passing": dict(of.passing), "peak": of.peak}

    return {
        "model": config.model,
        "dtype": config.dtype,
        "weights": sum(count for count, *_ in work.parameters),
        "trained": sum(count for count, _, own in work.parameters if own),
        "batched": work.verdict.batched,
        "chunked": work.verdict.chunked,
        "memory": config.memory.model_dump(),
        "processes_per_replica": config.shards,
        "process": {"device": place(need.device), "host": place(need.host), "files": dict(need.files)},
        "mapped": need.mapped,
        "run": storage(config, work),
        "machine": asdict(machine),
        "fits": fit.replicas > 0,
        "replicas_per_machine": fit.replicas,
        "missing": list(fit.missing),
        "changes": [
            {
                "overrides": change.words,
                "replicas_per_machine": change.plan.fit(machine).replicas,
                "changes_result": _changes_result(config, change),
            }
            for change in changes
        ],
        "assumed": _assumed(made),
    }
