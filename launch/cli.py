"""The command `zoray`. Nothing heavy is imported until a command runs, so that help comes at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from zoray import __version__
from zoray.errors import ZorayError

app = typer.Typer(
    name="zoray",
    help="Fine-tune language models on a Ray cluster without backpropagation: one byte per gradient.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[str, typer.Argument(help="The run's YAML file.")]
Run = Annotated[str, typer.Argument(help="Name of a run, or the path of its folder.")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer reads the annotation on Python 3.10)
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the configuration to change, as in task.max_length=64."),
]
Step = Annotated[Optional[int], typer.Option(help="Step of the weights; by default the last one.")]  # noqa: UP045
Runs = Annotated[str, typer.Option("--output-dir", help="Folder the runs are in.")]


def main() -> None:
    """Run the command; a fault of the user's is said in a few lines, and decides the exit status."""
    try:
        app()
    except ZorayError as error:
        if os.environ.get("ZORAY_DEBUG"):
            raise
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _http(address: str | None) -> str | None:
    """The address, or RAY_ADDRESS without one, where it is that of a job server."""
    found = address or os.environ.get("RAY_ADDRESS") or ""
    return found.rstrip("/") if found.startswith(("http://", "https://")) else None


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"zoray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["ZORAY_DEBUG"] = "1"


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    or_resume: Annotated[
        bool, typer.Option("--or-resume", help="Continue the run of this run_name where there is one: safe to repeat.")
    ] = False,
) -> None:
    """Start a run and see it to its end. Ctrl-C ends it at a step boundary."""
    if or_resume:
        from launch.repeat import train_or_resume

        train_or_resume(config, overrides or [])
        return
    from launch.train import train as run

    run(config, overrides or [])


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    device_memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Memory of one accelerator, as 80GiB; by default as here."),
    ] = None,
    host_memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Memory of one machine, as 256GiB; by default what is free here."),
    ] = None,
    devices_per_machine: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Accelerators of one machine; by default as many as here."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a run will need, and what would fit, before anything is loaded. Exit status 7 if it does not fit."""
    from launch.plan import plan as foresee

    foresee(config, overrides or [], device_memory, host_memory, devices_per_machine, as_json)


@app.command()
def tune(
    config: Config,
    overrides: Overrides = None,
    learning_rates: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Those to try, as 0.03,0.1; by default six around the configuration's."),
    ] = None,
    epsilons: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The same of epsilon; by default the configuration's and another, ten times off."),
    ] = None,
    rungs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="How often trials are compared; by default up to 3."),
    ] = None,
    eta: Annotated[int, typer.Option(min=2, help="One of so many trials goes on to the next rung.")] = 3,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Steps of the last rung; by default a tenth of max_steps, at least 30."),
    ] = None,
    budget: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Instead: forward passes of all trials together."),
    ] = None,
    name: Annotated[Optional[str], typer.Option(help="Name of the study's folder.")] = None,  # noqa: UP045
    write: Annotated[Optional[Path], typer.Option(help="Write the configuration with the best values.")] = None,  # noqa: UP045
    address: Annotated[Optional[str], typer.Option(help="Address of Ray (also RAY_ADDRESS).")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Search learning rate and epsilon on the run's own task by successive halving; repeated, it continues."""
    from launch.tune import Search
    from launch.tune import tune as search

    asked = Search(learning_rates, epsilons, rungs, eta, steps, budget)
    search(config, overrides or [], asked, name=name, write=write, address=address, as_json=as_json)


JobServer = Annotated[
    Optional[str],  # noqa: UP045 (typer reads the annotation on Python 3.10)
    typer.Option("--address", help="Ray's job server, as http://HEAD:8265 (also RAY_ADDRESS)."),
]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Show what the run says until it ends.")]
AnyVersion = Annotated[
    bool, typer.Option("--any-version", help="Although the cluster has another version of Zoray or Ray.")
]


@app.command()
def resume(
    run: Run,
    overrides: Overrides = None,
    output_dir: Runs = "runs",
    break_lock: Annotated[
        bool, typer.Option("--break-lock", help="Although another machine, known to be gone, still seems to run it.")
    ] = False,
    address: JobServer = None,
    follow: Follow = False,
    any_version: AnyVersion = False,
) -> None:
    """Continue a run with the first step that is not in its ledger; with --address on a cluster, as `zoray submit`."""
    if http := _http(address):
        from launch.jobs.submit import resume as send

        folder = None if output_dir == "runs" else output_dir
        send(run, overrides or [], http, folder, follow=follow, break_lock=break_lock, any_version=any_version)
        return
    from launch.train import resume as again

    again(run, overrides or [], output_dir, break_lock)


@app.command()
def render(
    config: Config,
    overrides: Overrides = None,
    image: Annotated[
        str, typer.Option(help="Image with Zoray, as k8s/Dockerfile makes it (also ZORAY_IMAGE).", envvar="ZORAY_IMAGE")
    ] = f"zoray:{__version__}",
    namespace: Annotated[str, typer.Option(help="Namespace of the objects.")] = "zoray",
    storage_claim: Annotated[
        str, typer.Option(help="PersistentVolumeClaim for runs, models and data, mounted as /zoray.")
    ] = "zoray",
    memory: Annotated[str, typer.Option(help="Memory of one replica.")] = "8Gi",
    spot: Annotated[bool, typer.Option("--spot", help="Let workers use, and prefer, spot machines.")] = False,
    queue: Annotated[Optional[str], typer.Option(help="Kueue LocalQueue that admits the job.")] = None,  # noqa: UP045
    network_policy: Annotated[
        bool, typer.Option("--network-policy", help="Let only the run, the operator and Prometheus connect to it.")
    ] = False,
    auth: Annotated[bool, typer.Option("--auth", help="Ray's token authentication.")] = False,
    retries: Annotated[int, typer.Option(min=0, help="Times the run is continued on a new cluster after a fault.")] = 3,
    ttl: Annotated[int, typer.Option(min=0, help="Seconds the cluster is kept after the end.")] = 300,
) -> None:
    """Print a KubeRay RayJob for a run, to be given to `kubectl apply -f -`."""
    from launch.kubernetes.render import render as write

    cluster = {"image": image, "namespace": namespace, "claim": storage_claim, "memory": memory, "spot": spot}
    optional = {"queue": queue, "network_policy": network_policy, "auth": auth, "retries": retries, "ttl": ttl}
    write(config, overrides or [], **cluster, **optional)


@app.command()
def submit(
    config: Annotated[str, typer.Argument(help="The run's YAML file.")],
    overrides: Overrides = None,
    address: JobServer = None,
    follow: Follow = False,
    working_dir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder with your own code, to take along; without it only the configuration travels."),
    ] = None,
    any_version: AnyVersion = False,
) -> None:
    """Start a run on a cluster from a laptop; it goes on without it. Ctrl-C ends only this command."""
    from launch.jobs.submit import submit as send

    send(config, overrides or [], address, follow, working_dir, any_version)


@app.command()
def logs(run: Run, address: JobServer = None, follow: Follow = False) -> None:
    """Show what a submitted run says."""
    from launch.jobs.submit import logs as show

    show(run, address, follow)


@app.command(hidden=True)
def drive() -> None:
    """On the cluster: check and run what `zoray submit` has sent."""
    from launch.jobs.driver import drive as run

    run()


@app.command(hidden=True)
def answer(
    words: Annotated[list[str], typer.Argument(help="A command and its arguments, after --.")],
    every: Annotated[float, typer.Option(help="Seconds between two answers; 0: only one.")] = 0.0,
    lasting: Annotated[float, typer.Option(help="Seconds for which it is answered.")] = 0.0,
) -> None:
    """On the cluster: answer a question that came over HTTP."""
    from launch.jobs.driver import answer as say

    say(words, every, lasting)


Json = Annotated[bool, typer.Option("--json", help="JSON instead of words.")]
Address = Annotated[
    Optional[str],  # noqa: UP045 (typer reads the annotation on Python 3.10)
    typer.Option(
        help="Address of Ray, where the run's folder is not here to tell it (also RAY_ADDRESS); or, from anywhere, of "
        "its job server, as http://HEAD:8265."
    ),
]


def _over_http(address: str | None, *words: str) -> bool:
    """Ask the cluster itself where its address is that of a job server; whether it is."""
    if http := _http(address):
        from launch.jobs.remote import relay

        relay(http, *words)
    return http is not None


def _flags(as_json: bool, output_dir: str) -> list[str]:
    return [*(["--json"] if as_json else []), *(["--output-dir", output_dir] if output_dir != "runs" else [])]


@app.command("list")
def listing(as_json: Json = False, output_dir: Runs = "runs", address: Address = None) -> None:
    """Show the runs there are, and where they are."""
    if _over_http(address, "list", *_flags(as_json, output_dir)):
        return
    from launch.status import listing as show

    show(as_json, output_dir, address)


@app.command()
def status(run: Run, as_json: Json = False, output_dir: Runs = "runs", address: Address = None) -> None:
    """Show where a run is, and its replicas."""
    if _over_http(address, "status", run, *_flags(as_json, output_dir)):
        return
    from launch.status import show

    show(run, as_json, output_dir, address)


@app.command()
def watch(run: Run, output_dir: Runs = "runs", address: Address = None) -> None:
    """Look at a run in the terminal until it ends. Ctrl-C leaves it going."""
    from launch.watching.watch import watch as look

    look(run, output_dir, address, _http(address))


@app.command()
def scale(
    run: Run,
    replicas: Annotated[int, typer.Argument(help="How many replicas there should be.")],
    memory: Annotated[
        str | None,
        typer.Option(
            help="Section `memory` of replicas that are started from now on, e.g. '{kind: zero3, shards: 2}'."
        ),
    ] = None,
    output_dir: Runs = "runs",
    address: Address = None,
) -> None:
    """Change the number of replicas, or how new ones are held, while a run goes on; its result stays the same."""
    chosen = [] if memory is None else ["--memory", memory]
    if _over_http(address, "scale", run, *_flags(False, output_dir), *chosen, "--", str(replicas)):
        return
    from launch.status import scale as change

    change(run, replicas, output_dir, address, memory)


@app.command()
def stop(run: Run, output_dir: Runs = "runs", address: Address = None) -> None:
    """End a run at the next step boundary, from another process; it can be resumed."""
    if http := _http(address):
        from launch.jobs.submit import stop as end_job

        end_job(run, http, *_flags(False, output_dir))
        return
    from launch.status import stop as end

    end(run, output_dir, address)


@app.command("eval")
def evaluate(
    run: Run,
    step: Step = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    output_dir: Runs = "runs",
) -> None:
    """Evaluate a run's weights on its held-out data, in this process."""
    from launch.evaluate import evaluate as measure

    measure(run, step, as_json, output_dir)


@app.command()
def export(
    run: Run,
    to: Annotated[str, typer.Option(help="Folder to make; also s3://bucket/name, gs://bucket/name.")],
    step: Step = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="A LoRA run's adapter alone, not merged.")] = False,
    output_dir: Runs = "runs",
) -> None:
    """Write a run's model as a plain Hugging Face folder; a prefix as a plain folder of peft."""
    from launch.export import export as write

    write(run, to, step, adapter, output_dir)


@app.command()
def verify(run: Run, output_dir: Runs = "runs") -> None:
    """Check the ledger's hash chain, then replay it from the base model to every recorded digest."""
    from launch.verify import verify as check

    check(run, output_dir)


@app.command()
def log(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with all terms.")] = False,
    parquet: Annotated[Optional[Path], typer.Option(help="Write a Parquet file.")] = None,  # noqa: UP045
    last: Annotated[Optional[int], typer.Option(min=1, help="Only the last so many steps.")] = None,  # noqa: UP045
    output_dir: Runs = "runs",
) -> None:
    """Show a run's ledger."""
    from launch.log import log as show

    show(run, as_json, parquet, last, output_dir)


@app.command()
def plot(
    run: Run,
    to: Annotated[Optional[Path], typer.Option(help="The PNG; by default plot.png in the run's folder.")] = None,  # noqa: UP045
    output_dir: Runs = "runs",
) -> None:
    """Draw a run: loss, evaluation, gradient size, step time."""
    from launch.plot import plot as draw

    draw(run, to, output_dir)


@app.command()
def monitor(
    output_dir: Runs = "runs",
    port: Annotated[int, typer.Option(help="Port of Prometheus, on this machine only.")] = 9090,
    grafana_port: Annotated[int, typer.Option("--grafana-port", help="Port of Grafana, on this machine only.")] = 3000,
    interval: Annotated[float, typer.Option(min=0.1, max=300, help="Seconds between two scrapes.")] = 5.0,
) -> None:
    """Watch the runs of this machine with Prometheus, and Grafana where it is installed. Ctrl-C ends it."""
    from launch.monitor import monitor as watch

    watch(output_dir, port, grafana_port, interval)


if __name__ == "__main__":
    main()
