"""What a rehearsal begins with: a person's laptop, a volume, and a machine for the pods of what was rendered."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import plain
from tests.cluster.helpers import PATIENCE, ROOT, ZORAY, Result, ledger_of
from tests.cluster.rehearsal.container import IMAGE_ROOT, may_be_anyone
from tests.cluster.rehearsal.kubelet import Kubelet
from tests.cluster.rehearsal.kuberay import Object
from tests.conftest import SENTENCES, make_model
from zoray.config import RunConfig

_STARTED = time.monotonic()
_TASK = {"kind": "causal_lm", "train": "data/train.jsonl", "eval": "data/eval.jsonl", "max_length": 16}
_CONFIG: dict[str, Any] = {
    "model": "gpt2",
    "task": _TASK,
    "directions": 3,
    "per_direction_batch_size": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "optimizer": {"normalize": "none"},
    "epsilon": 1e-3,
    "eval_steps": 100,
    "replicas": {"min": 1, "max": 3},
}


def say(text: str) -> None:
    """A line of the story."""
    print(f"{time.monotonic() - _STARTED:5.0f} s  {text}", flush=True)


class Laptop:
    """Where the person is: model and data, the command `zoray`, and the way to the head's port.

    Attributes:
        folder: with all that.
        token: what the cluster wants to be told, if it does.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, ""
        (folder / "data").mkdir(parents=True)
        make_model("gpt2", folder, n_layer=1)
        rows = [json.dumps({"text": " ".join(SENTENCES[(i * j) % 7] for j in range(4))}) + "\n" for i in range(40)]
        (folder / "data" / "train.jsonl").write_text("".join(rows[:30]))
        (folder / "data" / "eval.jsonl").write_text("".join(rows[30:]))

    def rendered(self, run: str, steps: int, *options: str) -> tuple[Object, Object]:
        """ConfigMap and RayJob of a run, as the command writes them."""
        (self.folder / "run.yaml").write_text(yaml.safe_dump({**_CONFIG, "run_name": run, "max_steps": steps}))
        config, job = yaml.safe_load_all(self.zoray("render", "run.yaml", *options))
        say(f"{' '.join(['zoray render run.yaml', *options])}: {config['kind']} and {job['kind']} {run}")
        return config, job

    def zoray(self, *words: str, code: int = 0) -> str:
        """What a command says that must end with this status."""
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(self.folder)}
        if self.token:
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        done = subprocess.run(
            [*ZORAY, *words], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def undisturbed(self, steps: int, folder: Path) -> Result:
        """What comes of the run in one process, without Ray, when nothing happens to it."""
        task = _TASK | {key: str(self.folder / str(_TASK[key])) for key in ("train", "eval")}
        here = {"model": str(self.folder / "gpt2"), "task": task, "max_steps": steps, "output_dir": str(folder)}
        made, finish = plain.undisturbed(RunConfig.model_validate(_CONFIG | here))
        assert finish.reason == "done" and finish.digest is not None
        return Result(ledger_of(made), finish.step, f"{finish.digest:016x}")


class Scene:
    """A machine with a volume, on which is what the notes of `zoray render` ask for.

    Attributes:
        volume: its folder.
        kubelet: what runs pods here.
    """

    def __init__(self, folder: Path, laptop: Laptop) -> None:
        self.volume, self._folder, self._mounts = folder / "volume", folder, {"zoray": folder / "volume"}
        self.volume.mkdir()
        self.slow_from(1 << 30)
        for name in ("gpt2", "data"):
            subprocess.run(["cp", "-r", str(laptop.folder / name), str(self.volume / name)], check=True)
        if may_be_anyone():
            # As the kubelet does for fsGroup, and as the pod is that `kubectl cp` copies through.
            self.volume.chmod(0o2775)
            subprocess.run(["chown", "-R", "1000:1000", str(self.volume)], check=True)
        brake = {"PYTHONPATH": f"{IMAGE_ROOT}/tests/cluster/brake:{IMAGE_ROOT}", "ZORAY_TEST_BRAKE": "/zoray/brake"}
        self.kubelet = Kubelet(folder, self._mounts, brake)

    def apply(self, config: Object) -> None:
        """Have a ConfigMap."""
        made = self._folder / config["metadata"]["name"]
        made.mkdir()
        for name, text in config["data"].items():
            (made / name).write_text(text)
        self._mounts[config["metadata"]["name"]] = made

    def slow_from(self, step: int) -> None:
        """Let replicas be slow from a step on, so that something can be done to the run there; see `brake/`."""
        (self.volume / "brake").write_text(str(step))
