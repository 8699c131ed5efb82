"""k8s/: every base and overlay is what the API server takes, what KubeRay takes, and what `zoray render` writes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.kubernetes.kuberay import network_policy, ray_job
from launch.kubernetes.pods import Cluster
from launch.kubernetes.rules import violations
from tests.unit import kustomization
from tests.unit.crds import ROOT, Object, documents, faults, needs_crds
from zoray import __version__
from zoray.config import RunConfig, load

K8S = ROOT / "k8s"
FOLDERS = sorted(path.parent for part in ("base", "overlays") for path in (K8S / part).glob("*/kustomization.yaml"))
OVERLAYS: dict[str, dict[str, Any]] = {
    "cpu": {"memory": "2Gi"},
    "gpu": {"memory": "16Gi"},
    "spot": {"memory": "16Gi", "spot": True},
    "secured": {"memory": "16Gi", "auth": True, "network_policy": True},
    "queued": {"memory": "16Gi", "queue": "zoray"},
}
"""By name, the options of `zoray render` that give the same."""


def name(folder: Path) -> str:
    return str(folder.relative_to(K8S))


def one(made: list[Object], kind: str) -> Object:
    (found,) = (document for document in made if document["kind"] == kind)
    return found


@pytest.fixture
def job() -> Object:
    """A RayJob that breaks no rule, to be spoilt."""
    return deepcopy(one(kustomization.build(K8S / "overlays" / "gpu"), "RayJob"))


def test_every_overlay_is_compared_with_render() -> None:
    assert {folder.name for folder in FOLDERS if folder.parent.name == "overlays"} == set(OVERLAYS)


@needs_crds
@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_the_schema_and_the_controller_take_every_object(folder: Path) -> None:
    for document in kustomization.build(folder):
        assert faults(document) == []
        if document["kind"] == "RayJob":
            assert violations(document) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_kubectl_makes_the_same_of_a_folder(folder: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl here")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(documents(done.stdout), key=kustomization.key) == kustomization.build(folder)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_render_writes_what_an_overlay_has(overlay: str, tmp_path: Path) -> None:
    made = kustomization.build(K8S / "overlays" / overlay)
    config, cluster = _run(made, tmp_path), _cluster(overlay)
    assert one(made, "RayJob") == ray_job("first-run", config, cluster)
    if cluster.network_policy:
        assert one(made, "NetworkPolicy") == network_policy("first-run", config, cluster)
    assert one(made, "PersistentVolumeClaim")["metadata"]["name"] == cluster.claim


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_configuration_of_an_overlay_fits_its_job(overlay: str, tmp_path: Path) -> None:
    made = kustomization.build(K8S / "overlays" / overlay)
    config = _run(made, tmp_path)
    head = one(made, "RayJob")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    ports = {port["name"]: port["containerPort"] for port in head["containers"][0]["ports"]}
    assert config.run_name == one(made, "RayJob")["metadata"]["name"] == one(made, "ConfigMap")["metadata"]["name"]
    assert ports["zoray-metrics"] == config.metrics_port
    assert config.output_dir.startswith("/zoray/")


def test_the_image_of_the_first_run_has_its_data() -> None:
    config = yaml.safe_load((K8S / "overlays" / "cpu" / "run.yaml").read_text())
    dockerfile = (K8S / "Dockerfile").read_text()
    assert "COPY configs configs" in dockerfile and "configs/quickstart/make_data.py" in dockerfile
    image = ROOT / "configs" / "quickstart"
    assert config["model"] == "/opt/zoray/configs/quickstart/model" and (image / "model" / "config.json").is_file()
    shipped = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    assert config["task"]["train"] == f"/opt/zoray/configs/{shipped['task']['train']}"
    same = set(shipped) - {"model", "task"}
    assert {key: config[key] for key in same} == {key: shipped[key] for key in same}


def test_everything_the_image_is_made_of_is_there_and_sent_to_docker() -> None:
    dockerfile, ignore = (K8S / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().split()
    sources = [word for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.M) for word in line.split()]
    assert {"zoray", "actors", "launch", "constraints.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists() and f"!{source}" in ignore


def test_the_readme_names_every_overlay_and_only_those() -> None:
    text = (K8S / "README.md").read_text()
    assert set(re.findall(r"overlays/([a-z]+)", text)) == set(OVERLAYS)
    assert set(re.findall(r"components/([a-z-]+)", text)) == {path.name for path in (K8S / "components").iterdir()}


# ---- the checks themselves can fail ----


def set_at(path: str, value: Any) -> Callable[[Object], None]:
    """A change of one field: `a/0/b`."""

    def change(document: Object) -> None:
        *parents, last = path.split("/")
        place: Any = document
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[int(last) if isinstance(place, list) else last] = value

    return change


CLUSTER, HEAD = "spec/rayClusterSpec", "spec/rayClusterSpec/headGroupSpec"
WORKERS = f"{CLUSTER}/workerGroupSpecs/0"


@needs_crds
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{HEAD}/rayStartParams/num-cpus", 0),
        (f"{HEAD}/template/spec/restartPolcy", "Never"),
        (f"{HEAD}/template/spec/containers/0/resources/limits/memory", "lots"),
        (f"{HEAD}/template/spec/containers/0/ports/0/containerPort", "6379"),
        (f"{WORKERS}/minReplicas", "1"),
        (f"{WORKERS}/template/spec/tolerations", {"key": "nvidia.com/gpu"}),
        (f"{CLUSTER}/autoscalerOptions/version", "v3"),
        ("spec/deletionStrategy", {"deletionRules": [{"policy": "DeleteAll", "condition": {"jobStatus": "FAILED"}}]}),
        ("spec/backoffLimit", 0.5),
        ("metadata/labels", {"app.kubernetes.io/instance": "x" * 64}),
    ],
)
def test_the_schema_refuses(job: Object, path: str, value: Any) -> None:
    set_at(path, value)(job)
    assert faults(job), f"{path} = {value!r} was not seen"


RULES = {"deletionRules": [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 60}}]}
OUT_OF_ORDER = [
    {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 60}},
    {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "ttlSeconds": 30}},
]
NO_STOP = ("spec/shutdownAfterJobFinishes", False)
NO_TTL = ("spec/ttlSecondsAfterFinished", 0)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ([("metadata/name", "n" * 48)], "48 characters"),
        ([("metadata/name", "1st")], "beginning with a letter"),
        ([("metadata/name", "a.b")], "beginning with a letter"),
        ([(f"{HEAD}/template/spec/restartPolicy", "Always")], "restartPolicy of head is Always"),
        ([(f"{WORKERS}/template/spec/restartPolicy", "OnFailure")], "restartPolicy of workers is OnFailure"),
        ([NO_STOP], "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"),
        ([("spec/ttlSecondsAfterFinished", -1)], "ttlSecondsAfterFinished is negative"),
        ([("spec/suspend", True), NO_STOP, NO_TTL], "suspend needs shutdownAfterJobFinishes"),
        ([(f"{HEAD}/rayStartParams/num-cpus", 0)], "num-cpus of head is 0"),
        ([(f"{WORKERS}/rayStartParams/num-gpus", 1)], "num-gpus of workers is 1"),
        ([("spec/deletionStrategy", RULES), NO_STOP], "deletionRules and ttlSecondsAfterFinished"),
        ([("spec/deletionStrategy", RULES), NO_TTL], "deletionRules and shutdownAfterJobFinishes"),
        ([("spec/deletionStrategy", {"onSuccess": {"policy": "DeleteSelf"}})], "both onSuccess and onFailure"),
        ([("spec/deletionStrategy", {"deletionRules": OUT_OF_ORDER})], "DeleteSelf would come before DeleteCluster"),
        ([("spec/deletionStrategy", {"deletionRules": OUT_OF_ORDER[:1] * 2})], "two deletionRules"),
        ([("spec/rayClusterSpec", None)], "neither rayClusterSpec nor clusterSelector"),
        ([("spec/backoffLimit", -1)], "backoffLimit is negative"),
        ([("spec/activeDeadlineSeconds", 0)], "activeDeadlineSeconds"),
        ([("spec/submissionMode", "SidecarMode")], "SidecarMode and submitterPodTemplate"),
        ([("spec/submissionMode", "InteractiveMode")], "InteractiveMode and backoffLimit"),
        ([("spec/runtimeEnvYAML", "a: [")], "runtimeEnvYAML"),
        ([(f"{WORKERS}/maxReplicas", 0)], "minReplicas of workers is above"),
        ([(f"{WORKERS}/template/spec/containers", [])], "workers has no container"),
        ([(f"{WORKERS}/suspend", True)], "workers is suspended"),
        ([(f"{WORKERS}/resources", {"CPU": "1"})], "resources as well as rayStartParams"),
        ([(f"{HEAD}/rayStartParams/labels", "a=b")], "labels"),
        ([(f"{HEAD}/template/spec/containers/0/env/0/name", "RAY_enable_autoscaler_v2")], "both given"),
        ([(f"{CLUSTER}/authOptions", {"mode": "token"}), (f"{CLUSTER}/rayVersion", "2.51.2")], "2.52"),
        ([("metadata/labels", {"kueue.x-k8s.io/queue-name": "q"})], "Kueue does not admit"),
    ],
)
def test_a_rule_of_the_controller_is_seen(job: Object, changes: list[tuple[str, Any]], rule: str) -> None:
    assert violations(job) == []
    for path, value in changes:
        set_at(path, value)(job)
    assert any(rule in text for text in violations(job)), violations(job)


def test_a_cluster_that_scales_by_itself_may_restart_its_pods_under_the_first_autoscaler(job: Object) -> None:
    job["spec"]["rayClusterSpec"]["autoscalerOptions"]["version"] = "v1"
    set_at(f"{WORKERS}/template/spec/restartPolicy", "Always")(job)
    assert violations(job) == []


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        ({"op": "replace", "path": "/spec/nowhere", "value": 1}, "nowhere"),
        ({"op": "add", "path": "/spec/rayClusterSpec/workerGroupSpecs/7/suspend", "value": True}, "not there"),
        ({"op": "move", "path": "/spec/suspend"}, "not known"),
    ],
)
def test_a_patch_that_does_not_fit_is_an_error(operation: Object, reason: str, tmp_path: Path) -> None:
    settings = {
        "resources": [str(K8S / "base" / "run")],
        "patches": [{"target": {"kind": "RayJob"}, "patch": json.dumps([operation])}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=reason):
        kustomization.build(tmp_path)


def _run(made: list[Object], folder: Path) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(one(made, "ConfigMap")["data"]["run.yaml"])
    return load(path)


def _cluster(overlay: str) -> Cluster:
    """The settings of an overlay; Ray is the one that the image is built with."""
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    keys: dict[str, Any] = {
        "image": f"zoray:{__version__}",
        "namespace": "zoray",
        "claim": "zoray",
        **OVERLAYS[overlay],
    }
    return Cluster(ray=pinned[1], **keys)
