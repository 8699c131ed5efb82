"""The Kubernetes objects of a run: a KubeRay RayJob (ray.io/v1), its configuration, and what goes with it.

Pure functions from a configuration to plain dictionaries; `render` checks, writes and explains them. `k8s/` has
the same objects to be read and edited by hand, and a test keeps the two equal.
"""

from __future__ import annotations

import math

from launch.kubernetes import pods
from launch.kubernetes.pods import CONFIG_FILE, CONFIG_FOLDER, Cluster, Object, Workers, labels
from zoray.config import RunConfig, dump

_GROUP = "workers"


def workers(config: RunConfig) -> Workers:
    """The pods that hold the replicas of a run, each whole number of GPUs or shares of one."""
    gpus = config.needs["GPU"]
    share = int(1 / gpus + 1e-9) if 0 < gpus < 1 else 1
    least, most, wanted = config.replica_limits

    def count(replicas: int) -> int:
        return math.ceil(replicas / share)

    return Workers(
        cpus=int(config.needs["CPU"]) * share,
        gpus=math.ceil(gpus),
        replicas_per_pod=share,
        minimum=count(least),
        maximum=count(wanted if most is None else most),
    )


def objects(name: str, config: RunConfig, cluster: Cluster) -> list[Object]:
    """Everything to apply for a run, in that order; `config` has the paths of the cluster and the run's name."""
    made = [config_map(name, config, cluster)]
    if cluster.network_policy:
        made.append(network_policy(name, config, cluster))
    return [*made, ray_job(name, config, cluster)]


def config_map(name: str, config: RunConfig, cluster: Cluster) -> Object:
    """The run's configuration, as resolved."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(name, cluster),
        "data": {CONFIG_FILE: dump(config)},
    }


def network_policy(name: str, config: RunConfig, cluster: Cluster) -> Object:
    """Who may connect to the run's pods; what they may connect to is left open (hub, object stores, API server)."""

    def anywhere(app: str) -> Object:
        return {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": app}}}

    def tcp(*ports: int) -> list[Object]:
        return [{"protocol": "TCP", "port": port} for port in ports]

    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(name, cluster),
        "spec": {
            "podSelector": {"matchLabels": labels(name)},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": labels(name)}}]},
                {"from": [anywhere("kuberay-operator")], "ports": tcp(8265)},
                {"from": [anywhere("prometheus")], "ports": tcp(8080, config.metrics_port)},
            ],
        },
    }


def ray_job(name: str, config: RunConfig, cluster: Cluster) -> Object:
    """The RayJob. Its entrypoint may be run any number of times: it begins the run or continues it."""
    metadata = _metadata(name, cluster)
    spec: Object = {
        "submissionMode": "K8sJobMode",
        # KubeRay hands this through two shells: nothing in it may need quotes.
        "entrypoint": f"zoray train --or-resume {CONFIG_FOLDER}/{CONFIG_FILE}",
        "backoffLimit": cluster.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": cluster.ttl,
        "submitterConfig": {"backoffLimit": 3},
        "submitterPodTemplate": pods.submitter(name, cluster),
        "rayClusterSpec": _ray_cluster(name, config, cluster),
    }
    if cluster.queue is not None:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = cluster.queue
        spec = {"suspend": True, **spec}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _ray_cluster(name: str, config: RunConfig, cluster: Cluster) -> Object:
    # Kueue admits a fixed number of pods, and refuses a RayJob that would scale by itself.
    elastic = cluster.queue is None
    spec: Object = {"rayVersion": cluster.ray, "enableInTreeAutoscaling": elastic}
    if elastic:
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": 60,
            "resources": pods.resources_of(cpu="500m", memory="512Mi"),
            "securityContext": pods.container_security(),
            "env": [{"name": "HOME", "value": "/tmp"}],
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }
    if cluster.auth:
        spec["authOptions"] = {"mode": "token"}
    group = workers(config)
    return {
        **spec,
        "headGroupSpec": pods.head(name, config.metrics_port, cluster),
        "workerGroupSpecs": [
            {
                "groupName": _GROUP,
                # KubeRay waits for so many before it submits the job, and the run for its minimum; Zoray asks Ray's
                # autoscaler for the others when it begins.
                "replicas": group.minimum if elastic else group.maximum,
                "minReplicas": group.minimum if elastic else group.maximum,
                "maxReplicas": group.maximum,
                **pods.workers(name, group, cluster),
            }
        ],
    }


def _metadata(name: str, cluster: Cluster) -> Object:
    return {"name": name, "namespace": cluster.namespace, "labels": labels(name)}
