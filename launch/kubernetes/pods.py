"""The pods of a run on Kubernetes: head, workers, and the one that submits the job; who they are and what they may do.

Where a value has a reason that the field's name does not tell, the reason is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launch.jobs.wire import VOLUME

Object = dict[str, Any]

MOUNT = "/zoray"
"""Where the volume is mounted in every pod: runs, models, data and the cache of the Hugging Face hub are below."""

METRICS_PORT = 9464
"""Of the coordinator's `/metrics`, where the configuration leaves it open: what scrapes it must know it beforehand."""

METRICS_PORT_NAME = "zoray-metrics"
"""The port's name on the head's container, by which a PodMonitor selects it."""

CONFIG_FOLDER, CONFIG_FILE = "/etc/zoray", "run.yaml"

DRAIN_SECONDS, GRACE_SECONDS = 30, 90
"""Ray's time for leaving after SIGTERM, and the kubelet's before SIGKILL: longer, or no drain would ever finish."""

_USER = 1000
_OBJECT_STORE = str(100 << 20)
_HEALTH_SINCE = (2, 53)
_SPOT_NODES = (
    ("cloud.google.com/gke-spot", "true"),
    ("eks.amazonaws.com/capacityType", "SPOT"),
    ("karpenter.sh/capacity-type", "spot"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
)


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a configuration does not say about the cluster its run is for.

    Attributes:
        image: with Zoray and Ray.
        namespace: of all objects.
        claim: name of the PersistentVolumeClaim, which every pod mounts (ReadWriteMany).
        memory: of one replica, as a Kubernetes quantity.
        ray: version of Ray in the image.
        spot: workers may be on machines that can be taken away at any time.
        queue: a Kueue LocalQueue that admits the job.
        network_policy: only the run's own pods, the operator and Prometheus may connect to its pods.
        auth: Ray's token authentication.
        retries: how often the job is begun again, on a new Ray cluster, before it counts as failed.
        ttl: seconds the Ray cluster is kept after the job's end.
    """

    image: str
    namespace: str
    claim: str
    memory: str
    ray: str
    spot: bool = False
    queue: str | None = None
    network_policy: bool = False
    auth: bool = False
    retries: int = 3
    ttl: int = 300


@dataclass(frozen=True, slots=True)
class Workers:
    """The worker group: pods of one replica, or of as many as share one GPU.

    Attributes:
        cpus, gpus: of one pod.
        replicas_per_pod: how many replicas have room in it.
        minimum, maximum: pods.
    """

    cpus: int
    gpus: int
    replicas_per_pod: int
    minimum: int
    maximum: int


def head(name: str, metrics_port: int, cluster: Cluster) -> Object:
    """The coordinator's and the driver's machine. Without processors for Ray, no replica is ever placed on it."""
    resources = resources_of(cpu="1", memory="4Gi")
    resources["limits"]["cpu"] = "2"
    container = _ray_container("ray-head", cluster, resources)
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, METRICS_PORT_NAME: metrics_port}
    container["ports"] = [{"name": port, "containerPort": number} for port, number in ports.items()]
    container["volumeMounts"].append({"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True})
    pod = _pod(container, cluster)
    pod["volumes"].append({"name": "config", "configMap": {"name": name}})
    start = {"num-cpus": "0", "dashboard-host": "0.0.0.0", "object-store-memory": _OBJECT_STORE}
    return {"rayStartParams": start, "template": {"metadata": {"labels": labels(name)}, "spec": pod}}


def workers(name: str, group: Workers, cluster: Cluster) -> Object:
    """The machines of the replicas, with the settings of Ray on them."""
    resources = resources_of(cpu=str(group.cpus), memory=times(cluster.memory, group.replicas_per_pod))
    start = {"num-cpus": str(group.cpus), "object-store-memory": _OBJECT_STORE}
    tolerations: list[Object] = []
    if group.gpus:
        start["num-gpus"] = str(group.gpus)
        for amounts in resources.values():
            amounts["nvidia.com/gpu"] = str(group.gpus)
        tolerations.append(_tolerate("nvidia.com/gpu"))
    # Beside the replicas' threads: the raylet and its agents, which a limit of the same size would slow down.
    resources["limits"]["cpu"] = str(group.cpus + 1)
    pod = {**_pod(_ray_container("ray-worker", cluster, resources), cluster), "automountServiceAccountToken": False}
    if cluster.spot:
        tolerations += [_tolerate(key) for key, _ in _SPOT_NODES]
        pod["affinity"] = {"nodeAffinity": _prefer_spot()}
    if tolerations:
        pod["tolerations"] = tolerations
    return {"rayStartParams": start, "template": {"metadata": {"labels": labels(name)}, "spec": pod}}


def submitter(name: str, cluster: Cluster) -> Object:
    """The pod that submits the job and prints its progress; KubeRay fills in its command."""
    container = {
        "name": "ray-job-submitter",
        "image": cluster.image,
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": resources_of(cpu="500m", memory="1Gi"),
        "securityContext": container_security(),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": _pod_security(),
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }
    return {"metadata": {"labels": labels(name)}, "spec": spec}


def _pod(container: Object, cluster: Cluster) -> Object:
    """What the head and the workers have in common; Ray's autoscaler v2 wants pods that are replaced, not restarted."""
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": _pod_security(),
        "containers": [container],
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {"name": "zoray", "persistentVolumeClaim": {"claimName": cluster.claim}},
        ],
    }


def _ray_container(name: str, cluster: Cluster, resources: Object) -> Object:
    environment = {
        "HOME": "/tmp",
        "HF_HOME": f"{MOUNT}/huggingface",
        VOLUME: MOUNT,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_SECONDS),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    container: Object = {
        "name": name,
        "image": cluster.image,
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        # For what must not be in a manifest: HF_TOKEN, the keys of an object store.
        "envFrom": [{"secretRef": {"name": "zoray-env", "optional": True}}],
        "resources": resources,
        "securityContext": container_security(),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "zoray", "mountPath": MOUNT}],
    }
    if release(cluster.ray) >= _HEALTH_SINCE:
        # A replica may have all processors busy, so the agent gets time to answer; older Rays get KubeRay's own probes.
        health = {"httpGet": {"path": "/api/healthz", "port": 52365}, "timeoutSeconds": 5, "periodSeconds": 10}
        container["readinessProbe"] = {**health, "initialDelaySeconds": 10, "failureThreshold": 6}
        container["livenessProbe"] = {**health, "initialDelaySeconds": 60, "failureThreshold": 12}
    return container


def labels(name: str) -> dict[str, str]:
    """By which the pods and the other objects of a run are found."""
    return {"app.kubernetes.io/part-of": "zoray", "app.kubernetes.io/instance": name}


def resources_of(**amounts: str) -> dict[str, dict[str, str]]:
    """As much as is asked for, and no more."""
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _pod_security() -> Object:
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER,
        "runAsGroup": _USER,
        "fsGroup": _USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Object:
    """No privileges, and nothing to write to but what is mounted."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _tolerate(key: str) -> Object:
    return {"key": key, "operator": "Exists", "effect": "NoSchedule"}


def _prefer_spot() -> Object:
    terms = [{"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]} for key, value in _SPOT_NODES]
    return {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": term} for term in terms]}


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, for comparing."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2])


def times(quantity: str, factor: int) -> str:
    """A multiple of a Kubernetes quantity, such as `8Gi`, in its own unit."""
    digits = quantity.rstrip("kKMGTPEi")
    return f"{int(digits) * factor}{quantity[len(digits) :]}"
