"""`make rehearsal`: a rendered RayJob on a Ray of this machine, as KubeRay would run it, in namespaces of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile

from tests.cluster.helpers import ROOT

KEPT = """\
as on a cluster: the objects are those of `zoray render`; a pod has their commands as KubeRay completes them, their
  variables and mounts, an address, a host's name and a process 1 of its own, user 1000 (where this machine lets root
  be anyone), a read-only root and no capabilities; probes, SIGTERM, grace and SIGKILL are as the manifest has them
"""
FAKED = """\
faked: Kubernetes and KubeRay, of which tests/cluster/rehearsal has the little that is needed; the autoscaler, whose
  orders are read and carried out by the story; the image, which is this machine's system and Python with the tree at
  /opt/zoray; the volume, a folder here; DNS, a file of hosts; processors and memory, of which Ray is told and which
  nobody limits; no GPU, seccomp, NetworkPolicy or Secret but the token's
"""
# All that is started, and all that is mounted, ends with this command, however that ends.
APART = [
    "setpriv", "--pdeathsig=KILL", "unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]),
    "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
]  # fmt: skip
# What mounts and makes networks is not on everybody's path.
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_TRIAL = "ip link add pods type bridge && ip link add pod1 type veth peer name eth0 && mount -t tmpfs none /mnt"


def obstacle() -> str | None:
    """Why this machine cannot have pods; None if it can."""
    for command in ("setpriv", "unshare", "nsenter", "ip", "pivot_root"):
        if shutil.which(command, path=_PATH) is None:
            return f"there is no command {command} on this machine"
    done = subprocess.run(
        [*APART, "sh", "-c", _TRIAL], env={**os.environ, "PATH": _PATH}, capture_output=True, text=True
    )
    return None if done.returncode == 0 else f"no namespaces on this machine: {done.stderr.strip()}"


def main() -> int:
    """Rehearse; returns the exit status."""
    if (why := obstacle()) is not None:
        print(f"cannot rehearse: {why}", file=sys.stderr)
        return 2
    print(f"{KEPT}{FAKED}", flush=True)
    # So that the folder is removed too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="zoray-rehearsal-") as folder:
        # Nothing of the user's own Ray, and no word but the story's.
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        own = {"PATH": _PATH, "PYTHONPATH": str(ROOT), "HOME": folder}
        own |= {"DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error"}
        command = [*APART, sys.executable, "-m", "tests.cluster.rehearsal.story", folder]
        try:
            return subprocess.run(command, cwd=ROOT, env={**kept, **own}).returncode
        except KeyboardInterrupt:
            return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
