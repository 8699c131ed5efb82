"""How the kubelet of a rehearsal starts a container: the commands that make its view of the world, and its own.

They run as process 1 of new namespaces of processes, mounts, network and host name, which end with it.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.helpers import ROOT
from tests.cluster.rehearsal.kuberay import Pod, amount

IMAGE_ROOT = "/opt/zoray"
"""Where the image has the tree, and where its commands are run, as in `k8s/Dockerfile`."""

_SYSTEM = ("bin", "lib", "lib32", "lib64", "libx32", "sbin", "usr")
_DEVICES = ("full", "null", "random", "tty", "urandom", "zero")
_USERS = "root:x:0:0:root:/root:/bin/bash\nzoray:x:1000:1000::/home/zoray:/bin/bash\n"
_GROUPS = "root:x:0:\nzoray:x:1000:\n"


def image_environment() -> dict[str, str]:
    """What the image sets: the one of `k8s/Dockerfile` has Zoray installed, this one has it on Python's path."""
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    return {"PATH": path, "PYTHONPATH": IMAGE_ROOT, "PYTHONUNBUFFERED": "1"}


def may_be_anyone() -> bool:
    """Whether processes may be given to the user that the manifest names: not where root is only root of a sandbox."""
    inside, _, count = Path("/proc/self/uid_map").read_text().split()[:3]
    return inside == "0" and int(count) > 1000


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a pod finds that is not in the manifest.

    Attributes:
        gateway: the network's, of 16 bits.
        hosts: the file that tells addresses by name, in place of DNS; it may change while pods run.
        volumes: the folders here of the claims and the ConfigMaps of the manifest, by their names.
        environment: variables of the image beside its own.
    """

    gateway: str
    hosts: Path
    volumes: dict[str, Path]
    environment: dict[str, str]


def script(pod: Pod, root: Path, ip: str, around: Surroundings) -> str:
    """The commands, for a shell: `root` is an empty folder that becomes the container's root."""
    lines = [
        "set -e",
        f"hostname {shlex.quote(pod.name)}",
        *_network(ip, around.gateway),
        f"mount -t tmpfs -o mode=755 image {root}",
        f"cd {root}",
        *_image(),
        *_etc(around.hosts),
        *_devices(),
        *_volumes(pod, around.volumes),
    ]
    if pod.container["securityContext"].get("readOnlyRootFilesystem"):
        lines.append("mount -o remount,ro,bind .")
    lines += ["cd .", "pivot_root . .", "umount -l ."]
    if pod.init:
        lines.append(shlex.join(inside(pod, around, *pod.init)))
    command = inside(pod, around, *pod.container["command"], *pod.container["args"])
    return "\n".join([*lines, f"exec {shlex.join(command)}"])


def inside(pod: Pod, around: Surroundings, *command: str) -> list[str]:
    """A command as a container of the pod has it: with its variables, as its user, with no more rights."""
    environment = {**image_environment(), **around.environment, "HOSTNAME": pod.name, **_environment(pod)}
    variables = [f"{key}={value}" for key, value in environment.items()]
    return ["env", "-i", f"--chdir={IMAGE_ROOT}", *variables, *_rights(pod), *command]


def _network(ip: str, gateway: str) -> list[str]:
    return [
        "ip link set lo up",
        # The other end is pushed in from outside.
        "until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done",
        f"ip addr add {ip}/16 dev eth0",
        "ip link set eth0 up",
        f"ip route add default via {gateway}",
    ]


def _image() -> list[str]:
    """This machine's system and Python, and the tree, none of which can be written to."""
    lines = []
    for name in _SYSTEM:
        path = Path("/") / name
        if path.is_symlink():
            lines.append(f"ln -s {os.readlink(path)} {name}")
        elif path.is_dir():
            lines += _read_only(path, name)
    for prefix in dict.fromkeys([sys.prefix, sys.base_prefix]):
        if not prefix.startswith("/usr"):
            lines += _read_only(Path(prefix), prefix.lstrip("/"))
    lines += _read_only(ROOT, IMAGE_ROOT.lstrip("/"))
    return [*lines, "mkdir -p proc sys tmp home/zoray", "mount -t proc proc proc", "mount --rbind /sys sys"]


def _read_only(source: Path, target: str) -> list[str]:
    there = shlex.quote(target)
    return [
        f"mkdir -p {there}",
        f"mount --bind {shlex.quote(str(source))} {there}",
        f"mount -o remount,ro,bind {there}",
    ]


def _etc(hosts: Path) -> list[str]:
    texts = {"passwd": _USERS, "group": _GROUPS, "nsswitch.conf": "hosts: files\n"}
    lines = ["mkdir etc", "cp -a /etc/alternatives /etc/ld.so.* etc/", "touch etc/resolv.conf etc/hosts"]
    lines.append(f"mount --bind {shlex.quote(str(hosts))} etc/hosts")
    return lines + [f"printf %s {shlex.quote(text)} > etc/{name}" for name, text in texts.items()]


def _devices() -> list[str]:
    lines = ["mkdir -p dev/shm", "ln -s /proc/self/fd dev/fd"]
    for name in _DEVICES:
        lines += [f"touch dev/{name}", f"mount --bind /dev/{name} dev/{name}"]
    return lines


def _volumes(pod: Pod, volumes: dict[str, Path]) -> list[str]:
    sources = {volume["name"]: volume for volume in pod.spec["volumes"]}
    group = pod.spec["securityContext"]["fsGroup"] if may_be_anyone() else 0
    lines = []
    for mount in sorted(pod.container["volumeMounts"], key=lambda mount: str(mount["mountPath"])):
        there = shlex.quote(mount["mountPath"].lstrip("/"))
        source: dict[str, Any] = sources[mount["name"]]
        lines.append(f"mkdir -p {there}")
        if "emptyDir" in source:
            limit = source["emptyDir"].get("sizeLimit")
            size = f",size={amount(limit)}" if limit else ""
            lines.append(f"mount -t tmpfs -o mode=2777,gid={group}{size} volume {there}")
            continue
        claim = source.get("persistentVolumeClaim", {}).get("claimName") or source["configMap"]["name"]
        lines.append(f"mount --bind {shlex.quote(str(volumes[claim]))} {there}")
        if mount.get("readOnly"):
            lines.append(f"mount -o remount,ro,bind {there}")
    return lines


def _environment(pod: Pod) -> dict[str, str]:
    # There are no Secrets here.
    assert all(source["secretRef"]["optional"] for source in pod.container.get("envFrom", []))
    return {item["name"]: item["value"] for item in pod.container["env"]}


def _rights(pod: Pod) -> list[str]:
    """As the security contexts have it; of the system calls that seccomp forbids nothing is known here."""
    context, own = pod.spec["securityContext"], pod.container["securityContext"]
    words = ["setpriv"]
    if may_be_anyone():
        words += [f"--reuid={context['runAsUser']}", f"--regid={context['runAsGroup']}"]
        words.append(f"--groups={context['fsGroup']}")
    if own["capabilities"]["drop"] == ["ALL"]:
        words += ["--inh-caps=-all", "--bounding-set=-all"]
    if not own["allowPrivilegeEscalation"]:
        words.append("--no-new-privs")
    return [*words, "--"]
