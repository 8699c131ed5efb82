"""The folder of a study: what a person, and a study that is continued, finds of it on disk.

study.yaml         the configuration as resolved, before learning rate and epsilon are put in
study.jsonl        the plan, the data it is judged on, then what happened to the trials; one JSON object a line
trials/NAME/       a run like any other (config.yaml, ledger/): `zoray resume` continues it where its trial ended
plot.png           loss against learning rate, and the curves
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zoray.config import RunConfig, dump, mathematics
from zoray.errors import RunError
from zoray.ledger import Ledger
from zoray.runs import RunFolder
from zoray.tuning.deciding import rules_of
from zoray.tuning.evaluated import Evaluated
from zoray.tuning.grid import Plan, Trial
from zoray.tuning.kernel import begin
from zoray.tuning.messages import Note
from zoray.tuning.race import Study

SEARCHED = ("learning_rate", "epsilon")

_OURS = {"study.yaml", "study.jsonl", "lock"}
"""What there is of a study that has not begun."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What trials are judged on.

    Attributes:
        source: `eval`: the held-out data; `train`: training examples, in want of those.
        examples: how many.
        shards: batches of one evaluation.
        fresh: no step of the study trains on them.
    """

    source: str
    examples: int
    shards: int
    fresh: bool

    @property
    def words(self) -> str:
        """The same in words, as the name of the loss."""
        return "held-out loss" if self.source == "eval" else "loss on training examples"


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """Paths of one study."""

    path: Path

    @property
    def name(self) -> str:
        """Name of the study: that of its folder."""
        return self.path.name

    @property
    def plot(self) -> Path:
        """The picture."""
        return self.path / "plot.png"

    @property
    def events(self) -> Path:
        """What happened."""
        return self.path / "study.jsonl"

    def trial(self, name: str) -> RunFolder:
        """The run that a trial is the beginning of."""
        return RunFolder(self.path / "trials" / name)

    def prepare(self, config: RunConfig, plan: Plan) -> bool:
        """Make the folder, or see that the study in it is this one; whether it had begun.

        Raises:
            RunError: another study, or something else, has that name, or the folder cannot be made.
        """
        wanted = _description(config, plan)
        found = next((row for row in self.rows() if row["event"] == "plan"), None)
        if found is not None and self.judged() is not None:
            self._compare(found["plan"], wanted)
            return True
        if self.path.exists() and any(each.name not in _OURS for each in self.path.iterdir()):
            raise RunError(
                f"{self.name} exists already, and is no study.",
                where=str(self.path),
                advice="give the study another --name",
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.events.unlink(missing_ok=True)
            (self.path / "study.yaml").write_text(dump(config), encoding="utf-8")
            self.append({"event": "plan", "plan": wanted})
        except OSError as error:
            raise RunError(f"The folder of the study cannot be made: {error}.", where=str(self.path)) from error
        return False

    def _compare(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        for key in dict.fromkeys([*found, *wanted]):
            if found.get(key) != wanted.get(key):
                raise RunError(
                    f"There is a study {self.name} already, with another {key}: {found.get(key)}, not "
                    f"{wanted.get(key)}.",
                    where=str(self.path),
                    advice="repeat its own command to continue it, or give the new one another --name",
                )

    def make_trial(self, config: RunConfig, trial: Trial, header: Mapping[str, Any]) -> Ledger:
        """The empty ledger of a trial, in a run folder of its own."""
        folder = self.trial(trial.name)
        for part in ("metrics", "snapshots"):
            (folder.path / part).mkdir(parents=True, exist_ok=True)
        folder.write_config(self.trial_config(config, trial))
        return Ledger.create(folder.ledger, dict(header))

    def trial_config(self, config: RunConfig, trial: Trial) -> RunConfig:
        """The configuration of the run that a trial is the beginning of."""
        changed = {"run_name": trial.name, "output_dir": str(self.path / "trials"), **asdict(trial)}
        return RunConfig.model_validate({**config.model_dump(mode="json"), **changed})

    def has(self, trial: Trial) -> bool:
        """Whether a trial has a ledger."""
        return (self.trial(trial.name).ledger / "commits.bin").exists()

    def note(self, note: Note) -> dict[str, Any]:
        """Write down what happened to a trial; returns the row, without the losses of single examples."""
        row: dict[str, Any] = {"event": note.kind, "trial": note.trial, "rung": note.rung, "step": note.step}
        if note.text:
            row["text"] = note.text
        found = note.evaluated
        if found is not None:
            row |= {"loss": found.loss, "standard_error": found.standard_error}
            row |= {"count": found.count, "correct": found.correct}
        self.append(row if found is None else {**row, "losses": found.losses})
        return row

    def judge(self, judged: Judged) -> None:
        """Note what the trials are judged on, or see that it is what it was.

        Raises:
            RunError: it is something else.
        """
        before = self.judged()
        if before is None:
            self.append({"event": "judged", **asdict(judged)})
        elif before != judged:
            raise RunError(
                f"The study was judged on {before.examples} examples ({before.source}), and would be on "
                f"{judged.examples} ({judged.source}): trials could not be compared.",
                where=str(self.path),
                advice="give it back the data and the batch size it began with, or give a new study another --name",
            )

    def judged(self) -> Judged | None:
        """What the trials are judged on, if that is known yet."""
        row = next((row for row in self.rows() if row["event"] == "judged"), None)
        return None if row is None else Judged(row["source"], row["examples"], row["shards"], row["fresh"])

    def evaluations(self) -> dict[str, list[Evaluated]]:
        """The evaluations there are, by trial, in the order of the rungs."""
        found: dict[str, dict[int, Evaluated]] = {}
        for row in self.rows():
            if row["event"] == "evaluated":
                found.setdefault(row["trial"], {})[row["rung"]] = Evaluated(tuple(row["losses"]), row["correct"])
        return {name: [by_rung[rung] for rung in sorted(by_rung)] for name, by_rung in found.items()}

    def study(self, config: RunConfig, plan: Plan, ledgers: Mapping[str, Ledger]) -> Study:
        """The study as it is on the disk."""
        judged = self.judged()
        assert judged is not None
        known = {name: (each.genesis, list(each.commits())) for name, each in ledgers.items()}
        return begin(plan, rules_of(config, judged.shards), known, self.evaluations())

    def finished(self, config: RunConfig, plan: Plan) -> Study | None:
        """The study, if it is over: to be looked at without any replica."""
        if self.judged() is None or not all(self.has(trial) for trial in plan.trials):
            return None
        with ExitStack() as stack:
            ledgers = {
                trial.name: stack.enter_context(Ledger.open(self.trial(trial.name).ledger, repair=False))
                for trial in plan.trials
            }
            study = self.study(config, plan, ledgers)
        return study if study.finish is not None else None

    def losses(self, name: str) -> list[float]:
        """Training loss of each step of a trial."""
        with Ledger.open(self.trial(name).ledger, repair=False) as ledger:
            return [commit.loss for commit in ledger.commits()]

    def rows(self) -> Iterator[dict[str, Any]]:
        """What happened, in order; a line that was cut off by a crash is passed over."""
        for line in self.events.read_bytes().splitlines() if self.events.is_file() else ():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a line; one that a crash cut off does not swallow it."""
        with self.events.open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _description(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """What must be the same for a study to be continued, as JSON has it."""
    same = {key: value for key, value in mathematics(config).items() if key not in SEARCHED}
    grid = {"trials": [trial.name for trial in plan.trials], "rungs": list(plan.rungs), "eta": plan.eta}
    found: dict[str, Any] = json.loads(json.dumps({**grid, **same, "max_steps": config.max_steps}))
    return found
