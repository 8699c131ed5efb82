"""The story that is rehearsed, from `zoray render` to the two digests; what it prints was seen, line by line."""

from __future__ import annotations

import json
import re
import sys
import time
import urllib.request
from pathlib import Path

from launch.kubernetes.pods import METRICS_PORT_NAME
from tests.cluster.helpers import until
from tests.cluster.rehearsal.attempt import Attempt
from tests.cluster.rehearsal.kubelet import Running
from tests.cluster.rehearsal.scene import Laptop, Scene, say

RUN, STEPS, SLOW_FROM = "rehearsal", 400, 10


def rehearse(folder: Path) -> None:
    """All of it, in a folder that is this rehearsal's own.

    Raises:
        AssertionError: something is not as it must be; with what the pod in question has said.
    """
    laptop = Laptop(folder / "laptop")
    scene = Scene(folder, laptop)
    scene.slow_from(SLOW_FROM)
    config, job = laptop.rendered(RUN, STEPS)
    scene.apply(config)

    first = Attempt(scene, job)
    first.run.reaches(SLOW_FROM)
    say(f"step {SLOW_FROM} is committed; from here on replicas are slowed down, to leave time for what comes")
    _looked_at(scene, first)
    _scaled_up(laptop, first)
    _drained(laptop, first)
    _killed(laptop, first)
    _scaled_down(laptop, first)
    _submitted_again(laptop, first)
    second = _begun_again(scene, first)

    scene.slow_from(1 << 30)
    assert second.run.ends() == 0, second.run.text
    say("all steps are committed, and the submitter ends with status 0")
    assert second.asked() == 0
    second.delete()
    second.deleted()
    _compared(laptop, second, folder / "undisturbed")
    _with_a_token(laptop, scene)


def _looked_at(scene: Scene, attempt: Attempt) -> None:
    """What k8s/README.md has a person and Prometheus do with the head's pod."""
    (port,) = (p["containerPort"] for p in attempt.head.pod.container["ports"] if p["name"] == METRICS_PORT_NAME)
    with urllib.request.urlopen(f"http://{attempt.head.ip}:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    assert re.search(rf'^zoray_committed_steps{{run="{RUN}"}} [0-9.]+', text, re.M), text
    told = scene.kubelet.execute(attempt.head, "zoray", "status", RUN, "--output-dir", "/zoray/runs")
    assert "running" in told, told
    say(f"  port {METRICS_PORT_NAME} of the head has the run's metrics, `kubectl exec ... zoray status` its state")


def _scaled_up(laptop: Laptop, attempt: Attempt) -> None:
    """To two replicas, as a person wants it and the autoscaler does it."""
    assert attempt.asked() == 3
    laptop.zoray("scale", RUN, "2", "--address", attempt.http)
    until(lambda: attempt.asked() == 2, "room for two replicas")
    say("zoray scale 2, over HTTP: the autoscaler is told to have room for 2 replicas, instead of 3")
    _joined(laptop, attempt, attempt.scaled_up(), 2)


def _drained(laptop: Laptop, attempt: Attempt) -> None:
    """A pod whose replica works is deleted, as by a drain of its machine."""
    running, run = attempt.workers.pop(), attempt.run
    running.terminate()
    say(f"{running.name} is deleted: SIGTERM to its process 1")
    line = run.logs("leaves: it was asked to leave")
    say(f"  {_words(line)}, at step {run.steps()}")
    say(f"  the pod has ended {running.terminated():.0f} s after SIGTERM")
    _joined(laptop, attempt, attempt.scaled_up(), 3)
    assert " is lost" not in run.log, run.log


def _killed(laptop: Laptop, attempt: Attempt) -> None:
    """A pod whose replica works is gone at once, as by the loss of its machine."""
    running, run = attempt.workers.pop(0), attempt.run
    running.kill()
    step, began = run.steps(), time.monotonic()
    say(f"{running.name} is killed with kill -9, at step {step}")
    line = run.logs(" is lost")
    say(f"  {_words(line).split(':')[0]}, known after {time.monotonic() - began:.0f} s, at step {run.steps()}")
    assert run.steps() > step
    _joined(laptop, attempt, attempt.scaled_up(), 4)


def _scaled_down(laptop: Laptop, attempt: Attempt) -> None:
    """To one replica; the pod of the other is idle then, and the autoscaler takes it away."""
    laptop.zoray("scale", RUN, "1", "--address", attempt.http)
    until(lambda: attempt.asked() == 1, "room for one replica")
    say("zoray scale 1, over HTTP: the autoscaler is told to have room for 1 replica")
    left = until(lambda: _left(laptop, attempt), "a pod without a replica")
    say(f"  {_words([line for line in attempt.run.log.splitlines() if ' leaves: ' in line][-1])}")
    attempt.scaled_down(left)
    say(f"  {left.name} is idle and deleted, and has ended {left.terminated():.0f} s after SIGTERM")


def _left(laptop: Laptop, attempt: Attempt) -> Running | None:
    """The worker pod without a replica, once there is one."""
    status = json.loads(laptop.zoray("status", RUN, "--json", "--address", attempt.http))
    hosts = {replica["host"] for replica in status["replicas"]}
    free = [running for running in attempt.workers if running.name not in hosts]
    return free[0] if len(free) == 1 else None


def _submitted_again(laptop: Laptop, attempt: Attempt) -> None:
    """The head's machine is lost, and the cluster gets another head before the submitters are all used up."""
    step = attempt.beheaded()
    attempt.headed()
    attempt.replaced()
    attempt.run.logs(f"resumed at step {step}")
    say(f"  the run goes on with step {step}, the first that is not in its ledger")
    _joined(laptop, attempt, attempt.workers[-1], 5)


def _begun_again(scene: Scene, attempt: Attempt) -> Attempt:
    """The head is lost, and this time the job counts as failed: another cluster, and another submission."""
    step = attempt.beheaded()
    say("backoffLimit: the cluster is deleted and, while its pods still end, made anew; the entrypoint is the same")
    attempt.delete()
    another = Attempt(scene, attempt.cluster.job)
    assert another.cluster.submission != attempt.cluster.submission
    attempt.deleted()
    another.run.logs(f"resumed at step {step}")
    say(f"  the run goes on with step {step}, the first that is not in its ledger")
    return another


def _compared(laptop: Laptop, attempt: Attempt, folder: Path) -> None:
    undisturbed, result = laptop.undisturbed(STEPS, folder), attempt.result()
    say(f"digest of the weights after {STEPS} steps of one undisturbed process: {undisturbed.digest}")
    say(f"digest of the weights after all that was done to the run:        {result.digest}")
    assert f"digest of the weights {result.digest}" in attempt.run.text
    assert result == undisturbed
    say(f"they are equal, and so are the {sum(map(len, result.ledger.values())):,} bytes of the two ledgers")


def _with_a_token(laptop: Laptop, scene: Scene) -> None:
    """A short run on a cluster that answers only to those who have its token."""
    config, job = laptop.rendered("secured", 20, "--auth")
    scene.apply(config)
    scene.slow_from(SLOW_FROM)
    attempt = Attempt(scene, job)
    attempt.run.reaches(SLOW_FROM)
    said = laptop.zoray("status", "secured", "--address", attempt.http, code=7)
    assert "token" in said, said
    laptop.token = attempt.cluster.token
    laptop.zoray("status", "secured", "--address", attempt.http)
    say("zoray status, over HTTP: refused without the token, and answered with it")
    scene.slow_from(1 << 30)
    assert attempt.run.ends() == 0, attempt.run.text
    attempt.delete()
    attempt.deleted()
    say("the submitter, with the token too, ends with status 0")


def _joined(laptop: Laptop, attempt: Attempt, running: Running, count: int) -> None:
    """Wait for the replica of a pod that was started; `count` have joined in all then, one works in each worker pod."""
    attempt.run.joins(count)
    say(f"  {running.name} is started, and its replica joins at step {attempt.run.steps()}")

    def look() -> list[str]:
        return attempt.hosts(json.loads(laptop.zoray("status", RUN, "--json", "--address", attempt.http)))

    say(f"  zoray status, over HTTP: a replica in {', '.join(until(look, 'a replica in each pod'))}")
    until(lambda: all(each.ready() for each in (attempt.head, *attempt.workers)), "all pods are ready still")


def _words(line: str) -> str:
    """A line of the log without its time."""
    return line[line.index("replica ") :]


if __name__ == "__main__":
    try:
        rehearse(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
