"""What KubeRay's controller (v1.7), or Kueue, refuses in a RayJob although the schema of `ray.io/v1` allows it.

The controller says so only in the object's events, after `kubectl apply` has succeeded; `zoray render` says it before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import yaml

Object = dict[str, Any]

MAX_NAME = 47
"""Characters of a RayJob's name: with what KubeRay appends, the names of its services must not exceed 63."""

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_AUTH_SINCE = (2, 52)
_DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_QUEUE = "kueue.x-k8s.io/queue-name"


def violations(job: Object) -> list[str]:
    """Every rule that a RayJob breaks, in words; it has passed the schema."""
    spec = job["spec"]
    found = [*_name(job["metadata"]["name"]), *_job(spec), *_deletion(spec), *_submission(spec)]
    if cluster := spec.get("rayClusterSpec"):
        found += [*_groups(cluster), *_scaling(cluster), *_authentication(cluster)]
    if _QUEUE in job["metadata"].get("labels", {}):
        found += _kueue(spec)
    return found


def _name(name: str) -> Iterator[str]:
    if len(name) > MAX_NAME:
        yield f"the name {name} has {len(name)} characters, more than {MAX_NAME}"
    if not _LABEL.fullmatch(name):
        yield f"the name {name} is not lower-case letters, digits and '-', beginning with a letter"


def _job(spec: Object) -> Iterator[str]:
    selector = spec.get("clusterSelector")
    if not selector and not spec.get("rayClusterSpec"):
        yield "neither rayClusterSpec nor clusterSelector is given"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("suspend") and selector:
        yield "suspend and clusterSelector exclude each other"
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished is negative"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit is negative"
    if spec.get("activeDeadlineSeconds", 1) <= 0:
        yield "activeDeadlineSeconds is not positive"
    try:
        environment = yaml.safe_load(spec.get("runtimeEnvYAML") or "{}")
    except yaml.YAMLError:
        environment = None
    if not isinstance(environment, dict):
        yield "runtimeEnvYAML is not a YAML mapping"


def _deletion(spec: Object) -> Iterator[str]:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    rules = strategy.get("deletionRules") or []
    old = [strategy[key]["policy"] for key in ("onSuccess", "onFailure") if key in strategy]
    if rules and old:
        yield "deletionRules and onSuccess or onFailure exclude each other"
    if not rules and len(old) < 2:
        yield "deletionStrategy needs deletionRules, or both onSuccess and onFailure"
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield "deletionRules and shutdownAfterJobFinishes exclude each other"
    if rules and spec.get("ttlSecondsAfterFinished"):
        yield "deletionRules and ttlSecondsAfterFinished exclude each other"
    if "DeleteNone" in old and spec.get("shutdownAfterJobFinishes"):
        yield "DeleteNone contradicts shutdownAfterJobFinishes"
    policies = [*old, *(rule["policy"] for rule in rules)]
    if "DeleteWorkers" in policies and (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling"):
        yield "DeleteWorkers and enableInTreeAutoscaling exclude each other"
    if spec.get("clusterSelector") and {"DeleteWorkers", "DeleteCluster"} & set(policies):
        yield "a cluster chosen by clusterSelector is not deleted with the job"
    yield from _deletion_times(rules)


def _deletion_times(rules: list[Object]) -> Iterator[str]:
    times: dict[Any, dict[str, int]] = {}
    for rule in rules:
        condition = rule["condition"]
        of_status = times.setdefault(condition.get("jobStatus") or condition.get("jobDeploymentStatus"), {})
        if rule["policy"] in of_status:
            yield f"two deletionRules are for {rule['policy']} of the same status"
        of_status[rule["policy"]] = condition.get("ttlSeconds", 0)
    for of_status in times.values():
        for earlier, later in pairwise([policy for policy in _DELETION_ORDER if policy in of_status]):
            if of_status[later] < of_status[earlier]:
                yield f"{later} would come before {earlier}"


def _submission(spec: Object) -> Iterator[str]:
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        yield "InteractiveMode and backoffLimit exclude each other"
    if mode == "SidecarMode":
        for key in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
            if spec.get(key):
                yield f"SidecarMode and {key} exclude each other"
        head = (spec.get("rayClusterSpec") or {}).get("headGroupSpec", {"template": {"spec": {}}})
        if head["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield "restartPolicy of the head is not Never, which SidecarMode needs"


def _named_groups(cluster: Object) -> list[tuple[str, Object]]:
    return [("head", cluster["headGroupSpec"]), *((g["groupName"], g) for g in cluster.get("workerGroupSpecs") or [])]


def _groups(cluster: Object) -> Iterator[str]:
    names = [name for name, _ in _named_groups(cluster)][1:]
    if len(set(names)) < len(names):
        yield "two worker groups have the same groupName"
    for name, group in _named_groups(cluster):
        start = group.get("rayStartParams") or {}
        for key, value in start.items():
            if not isinstance(value, str):
                yield f"rayStartParams {key} of {name} is {value!r}, which is not a string"
        if not group["template"].get("spec", {}).get("containers"):
            yield f"{name} has no container"
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(start):
            yield f"{name} has resources as well as rayStartParams of the same kind"
        if "labels" in start:
            yield f"rayStartParams of {name} have labels, which belong in its field labels"
        if group.get("minReplicas", 0) > group.get("maxReplicas", 2**31 - 1):
            yield f"minReplicas of {name} is above maxReplicas"


def _scaling(cluster: Object) -> Iterator[str]:
    head = cluster["headGroupSpec"]["template"]["spec"]
    variables = {
        item["name"]: item.get("value") for box in head.get("containers", [])[:1] for item in box.get("env", [])
    }
    variable = variables.get("RAY_enable_autoscaler_v2")
    version = (cluster.get("autoscalerOptions") or {}).get("version")
    if not cluster.get("enableInTreeAutoscaling"):
        if variable in ("1", "true"):
            yield "RAY_enable_autoscaler_v2 needs enableInTreeAutoscaling"
        return
    if version and variable is not None:
        yield "autoscalerOptions.version and RAY_enable_autoscaler_v2 are both given"
    for name, group in _named_groups(cluster):
        if group.get("suspend"):
            yield f"{name} is suspended, which the autoscaler does not allow"
        policy = group["template"].get("spec", {}).get("restartPolicy", "Never")
        if (version == "v2" or variable in ("1", "true")) and policy != "Never":
            yield f"restartPolicy of {name} is {policy}; the autoscaler v2 needs Never, or none"


def _authentication(cluster: Object) -> Iterator[str]:
    if (cluster.get("authOptions") or {}).get("mode") == "token":
        numbers = re.match(r"(\d+)\.(\d+)", cluster.get("rayVersion", ""))
        if numbers is None or tuple(map(int, numbers.groups())) < _AUTH_SINCE:
            yield f"authOptions need rayVersion 2.52 or later, not {cluster.get('rayVersion')!r}"


def _kueue(spec: Object) -> Iterator[str]:
    cluster = spec.get("rayClusterSpec") or {}
    if not spec.get("shutdownAfterJobFinishes"):
        yield "Kueue needs shutdownAfterJobFinishes"
    if spec.get("clusterSelector"):
        yield "Kueue does not admit a job on a cluster chosen by clusterSelector"
    if cluster.get("enableInTreeAutoscaling"):
        yield "Kueue does not admit a job with enableInTreeAutoscaling"
    names = [group["groupName"] for group in cluster.get("workerGroupSpecs") or []]
    if len(names) > 7:
        yield f"Kueue admits at most 7 worker groups, not {len(names)}"
    if "head" in names:
        yield "Kueue keeps the name head for the head group"
