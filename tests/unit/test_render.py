"""`zoray render`: what it writes is taken by Kubernetes and KubeRay, and means the run that was asked for."""

from __future__ import annotations

import json
import re
import shlex
import struct
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from launch.cli import app
from launch.kubernetes.kuberay import workers
from launch.kubernetes.pods import GRACE_SECONDS, times
from launch.kubernetes.render import to_yaml
from launch.kubernetes.rules import MAX_NAME, violations
from tests.conftest import TinyModel
from tests.unit.crds import ROOT, Object, documents, faults, needs_crds
from zoray import __version__
from zoray.config import RunConfig, load
from zoray.errors import ConfigError
from zoray.planning import Plan, Planner

SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
OPTIONS: dict[str, list[str]] = {
    "plain": [],
    "spot": ["--spot"],
    "secured": ["--auth", "--network-policy"],
    "queued": ["--queue", "team-a"],
    "elsewhere": ["--namespace", "ml", "--storage-claim", "runs.big", "--image", "registry.example:5000/zoray:a.b"],
    "patient": ["--retries", "0", "--ttl", "0", "--memory", "900M"],
}

Render = Callable[..., list[Object]]

PLANS: dict[str, Plan] = {}


def render(*words: str) -> tuple[list[Object], str]:
    """The objects that the command prints, and what it says beside them."""
    done = CliRunner().invoke(app, ["render", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return list(documents(done.stdout)), done.stderr


def refused(*words: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        CliRunner().invoke(app, ["render", *words], catch_exceptions=False)
    return caught.value


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`config(key=value, ...)`: write run.yaml, of a model and data on the cluster's volume, and return its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZORAY_IMAGE", raising=False)

    def write(**keys: Any) -> str:
        task = {"kind": "causal_lm", "train": "/zoray/data/train.jsonl", **keys.pop("task", {})}
        settings = {"model": "/zoray/models/m", "task": task, "max_steps": 6, "replicas": 2, **keys}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        return str(tmp_path / "run.yaml")

    return write


def job(made: list[Object]) -> Object:
    (found,) = (document for document in made if document["kind"] == "RayJob")
    return found


def group(made: list[Object]) -> Object:
    (found,) = job(made)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return found


def run(made: list[Object], folder: Path) -> RunConfig:
    """The configuration that travels inside, as the job will read it."""
    path = folder / "inside.yaml"
    path.write_text(made[0]["data"]["run.yaml"])
    return load(path)


@pytest.fixture
def planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan takes seconds, and the options of `zoray render` make no difference to it."""
    plan = Planner.plan

    def remembered(self: Planner) -> Plan:
        key = self.config.model_dump_json()
        if key not in PLANS:
            PLANS[key] = plan(self)
        return PLANS[key]

    monkeypatch.setattr(Planner, "plan", remembered)


# ---- what is written is taken ----


@needs_crds
@pytest.mark.usefixtures("planned_once")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_passes_schema_and_rules(path: Path, options: str) -> None:
    made, _ = render(str(path), *OPTIONS[options])
    assert [fault for document in made for fault in faults(document)] == []
    assert violations(job(made)) == []
    assert made[-1]["kind"] == "RayJob" and len({document["metadata"]["namespace"] for document in made}) == 1


@needs_crds
@pytest.mark.parametrize(
    "keys", [{"gpus_per_replica": 2.0}, {"gpus_per_replica": 0.25, "replicas": {"min": 3, "max": 9}}]
)
def test_runs_on_gpus_pass_schema_and_rules(config: Callable[..., str], keys: dict[str, Any]) -> None:
    for options in OPTIONS.values():
        made, _ = render(config(**keys), *options)
        assert [fault for document in made for fault in faults(document)] == []


def test_the_yaml_says_what_the_objects_say(config: Callable[..., str]) -> None:
    made, _ = render(config(run_name="a"), "--spot", "--network-policy")
    text = to_yaml(made)
    assert list(yaml.safe_load_all(text)) == made
    assert "&id" not in text and "*id" not in text
    assert "  run.yaml: |\n" in text


def test_names_that_other_readers_of_yaml_take_for_something_else_are_quoted(config: Callable[..., str]) -> None:
    text = to_yaml(render(config(run_name="y"), "--namespace", "1e5")[0])
    assert "\n  name: 'y'\n" in text and "\n  namespace: '1e5'\n" in text
    assert not re.search(r"\b(name|namespace|instance): (y|1e5)$", text, re.M)


# ---- what is written means the run ----


def test_the_job_is_the_run_and_may_be_begun_again(config: Callable[..., str], tmp_path: Path) -> None:
    made, _ = render(config(run_name="sst2-7f3a", epsilon=0.01), "max_steps=9")
    inside, spec = run(made, tmp_path), job(made)["spec"]
    assert inside.run_name == job(made)["metadata"]["name"] == "sst2-7f3a"
    assert (inside.max_steps, inside.epsilon, inside.output_dir) == (9, 0.01, "/zoray/runs")
    assert spec["entrypoint"].split()[:3] == ["zoray", "train", "--or-resume"] and spec["backoffLimit"] == 3
    # The command goes through the shells of the submitter and of Ray: no word of it may mean anything to one.
    assert shlex.join(spec["entrypoint"].split()) == spec["entrypoint"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (folder,) = (m["mountPath"] for m in head["containers"][0]["volumeMounts"] if m["name"] == "config")
    assert spec["entrypoint"].split()[3] == f"{folder}/run.yaml" and "run.yaml" in made[0]["data"]
    assert {"name": "config", "configMap": {"name": made[0]["metadata"]["name"]}} in head["volumes"]


def test_a_run_without_a_name_gets_one_for_good(config: Callable[..., str], tmp_path: Path) -> None:
    path = Path(config()).rename(tmp_path / "2_Big.Config-of-a-very-long-name-that-goes-on-and-on-and-on.yaml")
    names = {job(render(str(path))[0])["metadata"]["name"] for _ in range(3)}
    assert len(names) == 3
    for name in names:
        assert re.fullmatch(r"run-2-big-config-of-[a-z-]+-[0-9a-f]{4}", name) and len(name) <= MAX_NAME
    made, _ = render(str(path))
    assert run(made, tmp_path).run_name == job(made)["metadata"]["name"]


def test_the_head_has_no_room_for_a_replica_and_the_workers_for_one(config: Callable[..., str]) -> None:
    made, _ = render(config(threads_per_replica=3, gpus_per_replica=1.0), "--memory", "12Gi")
    head = job(made)["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0" and "num-gpus" not in head["rayStartParams"]
    start = group(made)["rayStartParams"]
    assert (start["num-cpus"], start["num-gpus"]) == ("3", "1")
    resources = group(made)["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == {"cpu": "3", "memory": "12Gi", "nvidia.com/gpu": "1"}
    assert resources["limits"] == {"cpu": "4", "memory": "12Gi", "nvidia.com/gpu": "1"}


@pytest.mark.parametrize(
    ("replicas", "bounds", "queued"),
    [(4, (1, 1, 4), (4, 4, 4)), ({"min": 2, "max": 16}, (2, 2, 16), (16, 16, 16)), (1, (1, 1, 1), (1, 1, 1))],
)
def test_the_worker_group_has_the_bounds_of_the_replicas(
    config: Callable[..., str], replicas: Any, bounds: tuple[int, ...], queued: tuple[int, ...]
) -> None:
    keys = ("replicas", "minReplicas", "maxReplicas")
    made, _ = render(config(replicas=replicas))
    assert tuple(group(made)[key] for key in keys) == bounds
    cluster = job(made)["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    made, _ = render(config(replicas=replicas), "--queue", "q")
    assert tuple(group(made)[key] for key in keys) == queued
    assert not job(made)["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] and job(made)["spec"]["suspend"]
    assert job(made)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"


@given(
    gpus=st.one_of(st.just(0.0), st.sampled_from([1.0, 2.0, 8.0]), st.integers(1, 10).map(lambda n: 1 / n)),
    threads=st.integers(1, 64),
    least=st.integers(1, 50),
    more=st.integers(0, 50),
)
def test_the_pods_hold_the_replicas_and_no_pod_is_in_vain(gpus: float, threads: int, least: int, more: int) -> None:
    settings = {
        "model": "m",
        "task": {"kind": "causal_lm", "train": "t"},
        "max_steps": 1,
        "gpus_per_replica": gpus,
        "threads_per_replica": threads,
        "replicas": {"min": least, "max": least + more},
    }
    made = workers(RunConfig.model_validate(settings))
    for pods, replicas in ((made.minimum, least), (made.maximum, least + more)):
        assert (pods - 1) * made.replicas_per_pod < replicas <= pods * made.replicas_per_pod
    assert made.cpus == threads * made.replicas_per_pod
    assert made.gpus + 1e-9 >= gpus * made.replicas_per_pod


def test_two_replicas_that_share_a_gpu_share_a_pod(config: Callable[..., str]) -> None:
    made, _ = render(config(gpus_per_replica=0.5, threads_per_replica=2, replicas=5), "--memory", "6Gi")
    assert group(made)["maxReplicas"] == 3 and group(made)["rayStartParams"]["num-cpus"] == "4"
    resources = group(made)["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == "1" and resources["requests"]["memory"] == "12Gi"


def test_every_pod_is_unprivileged_and_has_the_volume(config: Callable[..., str]) -> None:
    made, _ = render(config(), "--storage-claim", "big")
    spec = job(made)["spec"]
    pods = [spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"], group(made)["template"]["spec"]]
    for pod in [*pods, spec["submitterPodTemplate"]["spec"]]:
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] != 0
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
            assert security["capabilities"] == {"drop": ["ALL"]}
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted <= {volume["name"] for volume in pod["volumes"]} and "tmp" in mounted
    for pod in pods:
        assert {"name": "zoray", "persistentVolumeClaim": {"claimName": "big"}} in pod["volumes"]
        assert {"livenessProbe", "readinessProbe"} <= set(pod["containers"][0])


def test_the_kubelet_waits_longer_than_ray_drains(config: Callable[..., str]) -> None:
    from launch.repeat import PATIENCE

    made, _ = render(config())
    pod = group(made)["template"]["spec"]
    variables = {item["name"]: item["value"] for item in pod["containers"][0]["env"]}
    assert pod["terminationGracePeriodSeconds"] > float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) + 30
    # And the job that is begun again, longer than an old head may live.
    assert PATIENCE > GRACE_SECONDS + 30


def test_spot_machines_are_for_workers_only(config: Callable[..., str]) -> None:
    def keys(pod: Object) -> set[str]:
        return {toleration["key"] for toleration in pod.get("tolerations", [])}

    plain, spot = (render(config(gpus_per_replica=1.0), *options)[0] for options in ([], ["--spot"]))
    assert keys(group(plain)["template"]["spec"]) == {"nvidia.com/gpu"}
    assert keys(group(spot)["template"]["spec"]) > {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
    assert "affinity" in group(spot)["template"]["spec"]
    head = job(spot)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert keys(head) == set() and "affinity" not in head


def test_metrics_are_on_a_port_that_is_known_beforehand(config: Callable[..., str], tmp_path: Path) -> None:
    for given_port, port in ((0, 9464), (9100, 9100)):
        made, _ = render(config(metrics_port=given_port), "--network-policy")
        head = job(made)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        assert {"name": "zoray-metrics", "containerPort": port} in head["ports"]
        assert run(made, tmp_path).metrics_port == port
        (policy,) = (document for document in made if document["kind"] == "NetworkPolicy")
        assert port in [entry["port"] for rule in policy["spec"]["ingress"] for entry in rule.get("ports", [])]


def test_a_network_policy_chooses_the_pods_of_the_run_and_of_no_other(config: Callable[..., str]) -> None:
    made, _ = render(config(run_name="a"), "--network-policy")
    (policy,) = (document for document in made if document["kind"] == "NetworkPolicy")
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    assert chosen["app.kubernetes.io/instance"] == "a"
    spec = job(made)["spec"]
    for template in (spec["submitterPodTemplate"], spec["rayClusterSpec"]["headGroupSpec"]["template"]):
        assert template["metadata"]["labels"] == chosen
    assert group(made)["template"]["metadata"]["labels"] == chosen


def test_the_image_is_that_of_this_version_or_the_one_asked_for(
    config: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def images(made: list[Object]) -> set[str]:
        return set(re.findall(r'"image": "([^"]*)"', json.dumps(made)))

    assert images(render(config())[0]) == {f"zoray:{__version__}"}
    monkeypatch.setenv("ZORAY_IMAGE", "a/zoray:1")
    assert images(render(config())[0]) == {"a/zoray:1"}
    made, _ = render(config(), "--image", "b/zoray:2")
    assert images(made) == {"b/zoray:2"}
    assert job(made)["spec"]["rayClusterSpec"]["rayVersion"] == version("ray")


# ---- paths ----


def test_files_here_are_expected_at_the_same_place_of_the_volume(config: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a"}\n')
    made, said = render(config(model="m", task={"train": "data/train.jsonl", "eval": "data/missing.jsonl"}))
    inside = run(made, tmp_path)
    assert (inside.model, inside.task.train) == ("/zoray/m", "/zoray/data/train.jsonl")
    assert inside.task.eval == "/zoray/data/missing.jsonl"
    for place in ("/zoray/m", "/zoray/data/train.jsonl", "/zoray/data/missing.jsonl"):
        assert place in said
    assert str(tmp_path) not in json.dumps(made)


def test_names_on_the_hub_urls_and_paths_of_the_cluster_stay(config: Callable[..., str], tmp_path: Path) -> None:
    task = {"train": "s3://data/train.jsonl", "eval": "/mnt/shared/eval.jsonl"}
    made, said = render(config(model="facebook/opt-1.3b", task=task, output_dir="/zoray/team/runs"))
    inside = run(made, tmp_path)
    assert (inside.model, inside.task.train, inside.task.eval) == ("facebook/opt-1.3b", task["train"], task["eval"])
    assert inside.output_dir == "/zoray/team/runs"
    assert "facebook/opt-1.3b is taken from the hub" in said and "s3" not in said


def test_snapshots_are_on_a_store_or_on_the_volume(config: Callable[..., str], tmp_path: Path) -> None:
    for where in ("s3://bucket/snapshots", "../snapshots", "/zoray/snapshots"):
        made, said = render(config(model="s3://bucket/opt", snapshot_dir=where))
        inside = run(made, tmp_path)
        assert (inside.model, inside.snapshot_dir) == ("s3://bucket/opt", where) and "s3" not in said
    for where in ("/home/me/snapshots", "../../snapshots"):
        error = refused(config(snapshot_dir=where))
        assert "snapshot_dir" in str(error) and "volume" in str(error)


def test_a_path_that_only_this_machine_has_is_refused(config: Callable[..., str], tmp_path_factory: Any) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "train.jsonl"
    elsewhere.write_text('{"text": "a"}\n')
    error = refused(config(task={"train": str(elsewhere)}))
    assert str(elsewhere) in str(error) and "task.train" in str(error) and "/zoray/" in str(error)
    assert "../train.jsonl" in str(refused(config(task={"train": "../train.jsonl"})))
    error = refused(config(output_dir="/home/me/runs"))
    assert "/home/me/runs" in str(error) and "output_dir" in str(error)


# ---- bad input ----


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["run_name=" + "n" * (MAX_NAME + 1)], "at most 47"),
        (["run_name=SST2.a"], "lower-case"),
        (["run_name='7f3a'"], "beginning with a letter"),
        (["gpus_per_replica=1.5"], "whole numbers"),
        (["metrics_port=8265"], "dashboard"),
        (["metrics_port=80"], "root only"),
        (["--image", "my image"], "--image"),
        (["--namespace", "My_Team"], "--namespace"),
        (["--storage-claim", "a_b"], "--storage-claim"),
        (["--queue", "a.b"], "--queue"),
        (["--memory", "8 GB"], "--memory"),
        (["--memory", "0"], "--memory"),
        (["--memory", "300M"], "too little for a replica"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_first(config: Callable[..., str], words: list[str], text: str) -> None:
    error = refused(config(), *words)
    assert text in str(error) and error.exit_code == 2


def test_memory_below_the_plan_is_said(config: Callable[..., str], tmp_path: Path, tiny_model: TinyModel) -> None:
    model = tiny_model("gpt2", tmp_path)
    path = config(model=str(model), task={"max_length": 32})
    assert "may be too little" not in render(path, "--memory", "2Gi")[1]
    assert (
        "--memory 401Mi may be too little: a replica is planned to need 0.4 GiB" in render(path, "--memory", "401Mi")[1]
    )
    (model / "config.json").write_text("{}")
    assert "cannot be planned" in render(path, "--memory", "2Gi")[1]


def test_memory_that_cannot_hold_the_weights_is_refused(config: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 15, 1 << 16], "data_offsets": [0, 1 << 33]}}).encode()
    (tmp_path / "m" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    error = refused(config(model="m"), "--memory", "7Gi")
    assert "8.0 GiB" in str(error) and "7Gi" in str(error)
    made, _ = render(config(model="m", dtype="bfloat16"), "--memory", "7Gi")
    assert made


def test_a_configuration_that_is_wrong_is_refused_as_by_train(config: Callable[..., str]) -> None:
    assert "epsilon" in str(refused(config(epsilon=-1.0)))


@pytest.mark.parametrize(("quantity", "factor", "product"), [("8Gi", 2, "16Gi"), ("5k", 3, "15k"), ("5", 4, "20")])
def test_a_quantity_keeps_its_unit(quantity: str, factor: int, product: str) -> None:
    assert times(quantity, factor) == product
