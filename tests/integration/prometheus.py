"""A real Prometheus for the tests: the one on the PATH, or Debian's, unpacked into a cache and installed nowhere."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def find() -> Path:
    """The folder with `prometheus` and `promtool`; skips the test with the reason if they cannot be had."""
    found = shutil.which("prometheus")
    if found is not None and shutil.which("promtool") is not None:
        return Path(found).parent
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("there is no Prometheus on the PATH, and no apt-get to fetch Debian's")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(base) / "zoray-tests" / "prometheus"
    programs = cache / "usr" / "bin"
    if not (programs / "promtool").is_file():
        _fetch(cache)
    return programs


def _fetch(cache: Path) -> None:
    """Debian's package, by lists of apt's own in the cache, so that nothing of the machine's is changed."""
    work = cache.with_suffix(".new")
    shutil.rmtree(work, ignore_errors=True)
    for part in ("lists/partial", "archives/partial"):
        (work / part).mkdir(parents=True)
    options = ["-qq", "-o", f"Dir::State::lists={work / 'lists'}", "-o", f"Dir::Cache={work}",
               "-o", "APT::Sandbox::User="]  # fmt: skip
    for command in (
        ["apt-get", *options, "update"],
        ["apt-get", *options, "download", "prometheus"],
    ):
        try:
            subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=240, check=True)
        except subprocess.CalledProcessError as error:
            pytest.skip(
                f"Prometheus is not on the PATH and cannot be fetched: {error.stderr.strip().splitlines()[-1:]}"
            )
        except subprocess.TimeoutExpired:
            pytest.skip("Prometheus is not on the PATH, and Debian's archive does not answer")
    (package,) = work.glob("prometheus_*.deb")
    subprocess.run(["dpkg", "-x", str(package), str(work)], check=True)
    for part in ("lists", "archives", package.name):
        path = work / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(cache, ignore_errors=True)
    work.rename(cache)
