"""`zoray monitor`: a Prometheus, and a Grafana where it is installed, that watch the runs of this machine.

They get the same rules and dashboards as a cluster (k8s/monitoring); runs are found by their folders' state.json, so
those that start later are found too. Everything they keep is in `<output_dir>/.monitor`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote, urlsplit

import yaml
from rich.console import Console

from launch.control import IN_PROGRESS
from launch.service import Service
from zoray.errors import ResourceError
from zoray.runs import RunFolder

SHIPPED = Path(__file__).parent / "monitoring"
"""The rules and dashboards: k8s/monitoring of a checkout, a copy of it in an installed package."""

DASHBOARDS = ("zoray-run.json", "zoray-fleet.json")
_LOOK_EVERY = 1.0
_NO_GRAFANA = f"""not installed, so there are no dashboards, only the pages of Prometheus itself.
            To get it: install the package `grafana` from Grafana's own site, and begin again;
            or import {SHIPPED}/*.json into a Grafana elsewhere."""
_GLANCE = ("zoray_loss", "zoray_eval_loss", "zoray_replicas", "rate(zoray_tokens_total[1m])")


def monitor(output_dir: str, port: int, grafana_port: int, interval: float) -> None:
    """Watch the runs below a folder until Ctrl-C; `interval` is that between two scrapes, in seconds.

    Raises:
        ResourceError: Prometheus is not installed, a port is taken, or a server ends by itself.
    """
    runs = Path(output_dir).absolute()
    program, grafana = find_prometheus(), find_grafana()
    site = Site(runs / ".monitor", port, interval)
    site.write()
    with _ended() as ended, ExitStack() as stack:
        site.discover(runs)
        services = [stack.enter_context(site.prometheus(program))]
        pages = "&".join(f"g{i}.expr={quote(query)}&g{i}.tab=0" for i, query in enumerate(_GLANCE))
        _say("Prometheus", f"{services[0].url}/graph?{pages}")
        if grafana is None:
            _say("Grafana", _NO_GRAFANA)
        else:
            services.append(stack.enter_context(site.grafana(grafana, grafana_port)))
            _say("Grafana", f"{services[1].url}/d/zoray-fleet and {services[1].url}/d/zoray-run")
        _say("files", str(site.folder))
        _say("end", "Ctrl-C")
        told: list[str] | None = None
        while not ended.wait(0 if told is None else _LOOK_EVERY):
            names = site.discover(runs)
            if names != told:
                _say("runs", ", ".join(names) or f"none in progress in {runs}; one that begins is found")
                told = names
            for service in services:
                service.check()


def _say(label: str, text: str) -> None:
    Console(highlight=False, soft_wrap=True).print(f"{label:<10}  {text}", markup=False)


@dataclass(frozen=True)
class Site:
    """The folder in which Prometheus and Grafana have their files.

    Attributes:
        folder: made by `write`.
        port: of Prometheus.
        interval: seconds between two scrapes.
    """

    folder: Path
    port: int
    interval: float = 5.0

    def write(self) -> None:
        """Write the configuration of both, and the rules.

        Raises:
            ResourceError: the folder cannot be written, or this installation lacks the rules and dashboards.
        """
        try:
            rules = yaml.safe_load((SHIPPED / "prometheusrule.yaml").read_text())["spec"]
        except OSError as error:
            raise ResourceError(
                f"The rules and dashboards are missing from this installation: {error}.",
                where=str(SHIPPED),
                advice="install Zoray anew, or run it from a checkout, which has them in k8s/monitoring",
            ) from error
        boards, every = self.folder / "boards", f"{max(1, round(1000 * self.interval))}ms"
        provider = {"name": "Zoray", "folder": "Zoray", "type": "file", "options": {"path": str(boards)}}
        source = {"name": "Prometheus", "uid": "zoray-prometheus", "type": "prometheus", "access": "proxy",
                  "url": f"http://127.0.0.1:{self.port}", "isDefault": True,
                  "jsonData": {"timeInterval": every}}  # fmt: skip
        job = {"job_name": "zoray", "file_sd_configs": [{"files": ["targets.json"], "refresh_interval": "5s"}]}
        files = {
            "rules.yaml": rules,
            "prometheus.yml": {
                "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
                "rule_files": ["rules.yaml"],
                "scrape_configs": [job],
            },
            "provisioning/datasources/zoray.yaml": {"apiVersion": 1, "datasources": [source]},
            "provisioning/dashboards/zoray.yaml": {"apiVersion": 1, "providers": [provider]},
        }  # fmt: skip
        try:
            for name, content in files.items():
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(yaml.safe_dump(content, sort_keys=False))
            boards.mkdir(exist_ok=True)
            for name in DASHBOARDS:
                shutil.copyfile(SHIPPED / name, boards / name)
        except OSError as error:
            raise ResourceError(
                f"The files of Prometheus cannot be written: {error}.",
                where=str(self.folder),
                advice="give another --output-dir, or make this one writable",
            ) from error

    def discover(self, runs: Path) -> list[str]:
        """Let Prometheus know the runs in progress below a folder; returns their names."""
        found = {folder.name: target for folder in RunFolder.all(str(runs)) if (target := _target(folder))}
        labels = {"cluster": "local", "namespace": runs.name}
        content = json.dumps([{"targets": [target], "labels": labels} for target in found.values()], indent=2)
        path = self.folder / "targets.json"
        if not path.exists() or path.read_text() != content:
            # Renamed into its place: Prometheus looks as soon as anything changes.
            temporary = path.with_suffix(".tmp")
            temporary.write_text(content)
            temporary.replace(path)
        return list(found)

    def prometheus(self, program: str) -> Service:
        """Prometheus, to be started."""
        command = [
            program,
            f"--config.file={self.folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--log.level=warn",
        ]
        return Service("Prometheus", command, self.port, "/-/ready", self.folder / "prometheus.log")

    def grafana(self, found: tuple[list[str], Path], port: int) -> Service:
        """Grafana, to be started; anyone on this machine may look."""
        program, home = found
        settings = {
            "GF_PATHS_PROVISIONING": str(self.folder / "provisioning"),
            "GF_PATHS_DATA": str(self.folder / "grafana"),
            "GF_PATHS_LOGS": str(self.folder / "grafana"),
            "GF_SERVER_HTTP_ADDR": "127.0.0.1",
            "GF_SERVER_HTTP_PORT": str(port),
            "GF_AUTH_ANONYMOUS_ENABLED": "true",
            "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
            "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": str(self.folder / "boards" / "zoray-fleet.json"),
        }
        command = [*program, "--homepath", str(home)]
        return Service("Grafana", command, port, "/api/health", self.folder / "grafana.log", settings)


def _target(folder: RunFolder) -> str | None:
    """host:port of a run's metrics, if it is in progress."""
    from actors.lock import held_by

    state = folder.read_state()
    address = urlsplit(str(state.get("metrics_url", "")))
    if state.get("state") not in IN_PROGRESS or not address.port or held_by(folder.path) is None:
        return None
    # A machine's name need not resolve on the machine itself.
    host = "127.0.0.1" if address.hostname == socket.gethostname().lower() else address.hostname
    return f"{host}:{address.port}"


def find_prometheus() -> str:
    """Path of Prometheus.

    Raises:
        ResourceError: it is not installed.
    """
    if (program := shutil.which("prometheus")) is not None:
        return program
    raise ResourceError(
        "Prometheus is not installed: there is no program `prometheus` on the PATH.",
        where="PATH",
        advice="Debian, Ubuntu: `apt-get install prometheus`; macOS: `brew install prometheus`; or unpack a release "
        "and add its folder to the PATH. `zoray status`, `zoray plot` and the /metrics of a run work without it",
    )


def find_grafana() -> tuple[list[str], Path] | None:
    """The command that starts Grafana's server, and its home folder; None where it is not installed."""
    for words in (["grafana", "server"], ["grafana-server"]):
        program = shutil.which(words[0])
        if program is None:
            continue
        beside = Path(program).resolve().parent.parent
        homes = (os.environ.get("GF_PATHS_HOME", ""), "/usr/share/grafana", beside / "share" / "grafana", beside)
        for home in filter(None, map(str, homes)):
            if (Path(home) / "conf" / "defaults.ini").is_file():
                return [program, *words[1:]], Path(home)
    return None


@contextmanager
def _ended() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM and the end of the terminal set for the time of the block: so this is to end."""
    event = threading.Event()

    def handle(number: int, frame: FrameType | None) -> Any:
        event.set()

    # Under nohup the end of the terminal means nothing, and is left at that.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
