"""What KubeRay's operator (v1.7) makes of a RayJob: a cluster's pods with their commands, and the pod that submits.

Pure functions from the rendered objects to pods, after `controllers/ray/common/pod.go` and `job.go` of the operator.
"""

from __future__ import annotations

import copy
import secrets
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]

GCS, DASHBOARD, AGENT, METRICS = 6379, 8265, 52365, 8080
_HEAD_GROUP = "headgroup"
# `--key=value` for all but these, where true and false are a flag that is there or not.
_TAKE_TRUTHS = {"log-color", "include-dashboard"}
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_WAIT_FOR_GCS = "until ray health-check --address {} > /dev/null 2>&1; do sleep 5; done"
_HEALTHY = "import sys, urllib.request as r; sys.exit(b'success' not in r.urlopen('{}', timeout=5).read())"


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of one container, ready for a kubelet.

    Attributes:
        name: of the pod, which is its host's name too.
        spec: of the pod, from the manifest; its first container is complete.
        init: command of the container that runs to its end before.
    """

    name: str
    spec: Object
    init: tuple[str, ...] = ()

    @property
    def container(self) -> Object:
        """The one with Ray."""
        return self.spec["containers"][0]  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class RayCluster:
    """One of the clusters that a RayJob has had; each attempt of the job has its own.

    Attributes:
        job: the RayJob.
        name: of the cluster, and the beginning of its pods' names.
        submission: id under which the job is submitted to it.
        token: of the Secret that the operator makes for it, where the job wants token authentication.
    """

    job: Object
    name: str
    submission: str
    token: str = ""

    @staticmethod
    def of(job: Object) -> RayCluster:
        """A new cluster of a RayJob, and a new submission."""
        name = job["metadata"]["name"]
        token = "authOptions" in job["spec"]["rayClusterSpec"]
        return RayCluster(job, f"{name}-{_suffix()}", f"{name}-{_suffix()}", secrets.token_hex(16) if token else "")

    @property
    def service(self) -> str:
        """The name by which the pods find the head."""
        return f"{self.name}-head-svc.{self.job['metadata']['namespace']}.svc.cluster.local"

    @property
    def _spec(self) -> Object:
        return self.job["spec"]["rayClusterSpec"]  # type: ignore[no-any-return]

    @property
    def _authentication(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token} if self.token else {}

    def head(self) -> Pod:
        """The head's pod, without the autoscaler beside it."""
        group = copy.deepcopy(self._spec["headGroupSpec"])
        start = {"dashboard-host": "0.0.0.0", **group["rayStartParams"]}
        own = {"RAY_USAGE_STATS_EXTRA_TAGS": "kuberay_version=v1.7.0;kuberay_crd=RayJob"}
        mounts: list[Object] = []
        if self._spec.get("enableInTreeAutoscaling"):
            start["no-monitor"] = "true"
            # For the autoscaler's log.
            mounts = [{"name": "ray-logs", "mountPath": "/tmp/ray"}]
            if self._spec["autoscalerOptions"].get("version") == "v2":
                own["RAY_enable_autoscaler_v2"] = "true"
        return self._pod(group, f"{self.name}-head-{_suffix()}", "ray start --head", start, own, "127.0.0.1", mounts)

    def worker(self, number: int = 0) -> Pod:
        """One more pod of a worker group."""
        group = copy.deepcopy(self._spec["workerGroupSpecs"][number])
        start = {"address": f"{self.service}:{GCS}", **group["rayStartParams"]}
        own = {"FQ_RAY_IP": self.service, "RAY_IP": self.service.split(".")[0]}
        name = f"{self.name}-{group['groupName']}-worker-{_suffix()}"
        pod = self._pod(group, name, "ray start", start, own, self.service, [])
        wait = _WAIT_FOR_GCS.format(f"{self.service}:{GCS}")
        return Pod(pod.name, pod.spec, ("/bin/bash", "-c", "--", wait))

    def submitter(self) -> Pod:
        """The pod that submits the job, unless that was done, and prints what it says until it ends."""
        spec = copy.deepcopy(self.job["spec"]["submitterPodTemplate"]["spec"])
        address = f"http://{self.service}:{DASHBOARD}"
        healthy = f'python3 -c "{_HEALTHY.format(f"{address}/api/gcs_healthz")}"'
        entrypoint = self.job["spec"]["entrypoint"].strip()
        script = (
            f"until {healthy} >/dev/null 2>&1 ; do echo waiting for {address} ; sleep 2 ; done ; "
            f"if ! ray job status --address {address} {self.submission} >/dev/null 2>&1 ; then "
            f"ray job submit --address {address} --no-wait --submission-id {self.submission} -- {entrypoint} ; fi ; "
            f"ray job logs --address {address} --follow {self.submission}"
        )
        own = {
            "PYTHONUNBUFFERED": "1",
            "RAY_DASHBOARD_ADDRESS": f"{self.service}:{DASHBOARD}",
            "RAY_JOB_SUBMISSION_ID": self.submission,
            **self._authentication,
        }
        container = spec["containers"][0]
        container |= {"command": ["/bin/bash", "-ce", "--"], "args": [script]}
        container["env"] = [*container.get("env", []), *_variables(own)]
        return Pod(f"{self.job['metadata']['name']}-{_suffix()}", spec)

    def _pod(
        self, group: Object, name: str, command: str, start: Object, own: Object, head: str, mounts: list[Object]
    ) -> Pod:
        spec = group["template"]["spec"]
        container = spec["containers"][0]
        limits = container["resources"]["limits"]
        start = {
            "metrics-export-port": str(METRICS),
            "dashboard-agent-listen-port": str(AGENT),
            "memory": str(amount(limits["memory"])),
            **start,
            "block": "true",
        }
        command = f"{command} {_flags(start)}"
        container |= {"command": ["/bin/bash", "-c", "--"], "args": [f"ulimit -n 65536; {command}"]}
        given = {item["name"] for item in container["env"]}
        added = {
            **own,
            **self._authentication,
            "RAY_CLUSTER_NAME": self.name,
            "RAY_CLOUD_INSTANCE_ID": name,
            "RAY_NODE_TYPE_NAME": group.get("groupName", _HEAD_GROUP),
            "KUBERAY_GEN_RAY_START_CMD": command,
            "RAY_PORT": str(GCS),
            "RAY_ADDRESS": f"{head}:{GCS}",
            "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
            "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
        }
        container["env"] += _variables({key: value for key, value in added.items() if key not in given})
        shared = {"name": "shared-mem", "mountPath": "/dev/shm"}
        container["volumeMounts"] += [shared, *mounts]
        memory = {"medium": "Memory", "sizeLimit": limits["memory"]}
        spec["volumes"] += [{"name": "shared-mem", "emptyDir": memory}]
        spec["volumes"] += [{"name": mount["name"], "emptyDir": {}} for mount in mounts]
        return Pod(name, spec)


def amount(quantity: str) -> int:
    """A Kubernetes quantity such as `8Gi`, in bytes."""
    digits = quantity.rstrip("kKMGTi")
    return int(digits) * _UNITS.get(quantity[len(digits) :], 1)


def _flags(start: Object) -> str:
    words = []
    for key in sorted(start):
        if start[key].lower() in ("true", "false") and key not in _TAKE_TRUTHS:
            words += [f" --{key} "] if start[key].lower() == "true" else []
        else:
            words.append(f" --{key}={start[key]} ")
    return "".join(words)


def _variables(values: dict[str, str]) -> list[Object]:
    return [{"name": key, "value": value} for key, value in values.items()]


def _suffix() -> str:
    """Five letters and digits, as Kubernetes appends."""
    return "".join(secrets.choice("bcdfghjklmnpqrstvwxz2456789") for _ in range(5))
