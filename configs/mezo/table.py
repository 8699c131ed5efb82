"""Reproduce MeZO's table (Malladi et al. 2023): for each task train, choose the step by the dev loss, and test it.

Usage, from the root of the repository (docs/mezo.md says which data go where)::

    .venv/bin/python configs/mezo/table.py DATA [--tasks sst2,rte] [--rates 1e-6,1e-7] [KEY=VALUE]...

runs `zoray train configs/mezo/TASK.yaml` for every task and learning rate, with the data in
DATA/TASK/{train,validation} and the keys that are given (`model=facebook/opt-13b gpus_per_replica=1`), and then
`zoray eval` on the test set: once at step 0, which is zero-shot, and once at the best step of the best rate. Runs that
are there already are continued or taken as they are, so that the same command may be repeated. The table is printed as
Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
TASKS = ("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad", "drop")
TEXT = ("squad", "drop")
"""Measured by F1, the others by accuracy."""

ZORAY = str(Path(sys.executable).parent / "zoray")


def train(task: str, rate: str, options: argparse.Namespace) -> str:
    """Train one task at one learning rate; returns the run's name."""
    name = f"{options.name}-{task}-{rate}"
    data = Path(options.data).resolve() / task
    keys = [
        f"run_name={name}",
        f"output_dir={options.output_dir}",
        f"learning_rate={float(rate)!r}",
        f"task.train={data / 'train'}",
        f"task.eval={data / 'validation'}",
        *options.keys,
    ]
    command = [ZORAY, "train", str(FOLDER / f"{task}.yaml"), *keys, "--or-resume"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return name


def evaluations(run: str, output_dir: str) -> list[dict[str, Any]]:
    """The evaluations of a run on its dev set."""
    text = (Path(output_dir) / run / "metrics" / "evaluations.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test(run: str, step: int, options: argparse.Namespace) -> dict[str, Any]:
    """What the test set says of a run's weights at a step."""
    command = [ZORAY, "eval", run, "--step", str(step), "--json", "--output-dir", options.output_dir]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def measured(task: str, found: dict[str, Any]) -> float:
    """Accuracy or F1, in percent."""
    return 100 * (found["score"] if task in TEXT else found["correct"] / found["count"])


def main() -> None:
    """Parse the command line, run everything and print the table."""
    parser = argparse.ArgumentParser(description="MeZO's table.")
    parser.add_argument("data", help="folder with TASK/train and TASK/validation")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="keys of the configurations to change")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--rates", default="1e-6,1e-7", help="learning rates to choose from by the dev loss")
    parser.add_argument("--name", default="mezo", help="how the runs' names begin")
    parser.add_argument("--output-dir", default="runs")
    options = parser.parse_intermixed_args()
    lines = ["| task | measure | zero-shot | trained | rate | step |", "|---|---|---|---|---|---|"]
    for task in options.tasks.split(","):
        runs = {train(task, rate, options): rate for rate in options.rates.split(",")}
        steps = [(row["loss"], row["step"], run) for run in runs for row in evaluations(run, options.output_dir)]
        # A run that has diverged has losses that compare with nothing.
        _, step, best = min(each for each in steps if each[0] == each[0])
        before, after = (measured(task, test(best, at, options)) for at in (0, step))
        kind = "F1" if task in TEXT else "accuracy"
        lines.append(f"| {task} | {kind} | {before:.1f} | {after:.1f} | {runs[best]} | {step} |")
        print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
