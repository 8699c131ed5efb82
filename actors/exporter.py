"""The metrics of a run for Prometheus, on a registry of their own, served by the coordinator.

`/metrics` is the exposition, `/health` answers 200 while the coordinator's loop turns, and before it begins (loading a
model may take long), and 503 when it has stood still.
Names and meanings are documented in docs/metrics.md.
"""

from __future__ import annotations

import errno
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Literal, get_args
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Gauge, Histogram, disable_created_metrics, make_wsgi_app
from prometheus_client import Counter as Total

from actors.lookup import Lookup
from zoray import __version__
from zoray.errors import ResourceError
from zoray.protocol import Counters, Evaluation, State, StepRecord
from zoray.protocol.membership import Membership, SlotPhase

if TYPE_CHECKING:
    from actors.journal import Split

# When each counter began, as a series of its own: a third of the page, which nobody asks for.
disable_created_metrics()  # type: ignore[no-untyped-call]

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_STALLED = 30.0

Change = Literal["started", "joined", "left", "lost"]
"""What becomes of a replica: it is started, joins the run, and leaves as it was told to or is lost."""


class Exporter:
    """Metrics of one run; every one has the label `run`.

    Args:
        run: name of the run.
        model: what it started from.
        max_steps: steps of the run.
    """

    def __init__(self, run: str, model: str, max_steps: int) -> None:
        self.registry = CollectorRegistry()
        self._run = run
        self._alive: float | None = None
        self._faults = Counters()
        self._server: WSGIServer | None = None
        info = self._make(Gauge, "run_info", "Always 1; says what runs.", "version", "model")
        info.labels(run, __version__, model).set(1)
        self._make(Gauge, "max_steps", "Steps of the run.").labels(run).set(max_steps)
        self._step = self._make(Gauge, "committed_steps", "Steps in the ledger.").labels(run)
        self._committed = self._make(
            Gauge, "last_commit_timestamp_seconds", "When the latest step was committed; at first, when this began."
        ).labels(run)
        self._committed.set_to_current_time()
        # Without a child until there is a value: a loss of 0 would be the best there ever was.
        self._loss = self._make(Gauge, "loss", "Mean loss of the last step's finite probes.")
        self._eval_loss = self._make(Gauge, "eval_loss", "Held-out loss of the latest evaluation.")
        self._eval_accuracy = self._make(
            Gauge, "eval_accuracy_ratio", "Share of held-out examples classified right in the latest evaluation."
        )
        self._eval_score = self._make(
            Gauge,
            "eval_score",
            "Mean score of the latest evaluation: F1 of generated text, or that of a function.",
        )
        self._rate = self._make(Gauge, "learning_rate", "Learning rate of the last step.")
        self._gradient = self._make(
            Gauge, "projected_gradient_rms", "Root mean square of the last step's projected gradients."
        )
        self._noise = self._make(
            Gauge,
            "gradient_noise_ratio",
            "Share of noise of the batches in the last step's projected gradients, squared.",
        )
        self._factor = self._make(
            Gauge, "step_factor", "What steps are multiplied with since the loss has risen; 1 where it has not."
        )
        self._replicas = self._make(Gauge, "replicas", "Replicas by state.", "state")
        self._target = self._make(Gauge, "target_replicas", "Replicas there should be.").labels(run)
        self._members: Membership | None = None
        changes = self._make(Total, "replica_events_total", "What became of replicas.", "event")
        self._changes = {change: changes.labels(run, change) for change in get_args(Change)}
        self._seconds = self._make(Histogram, "step_duration_seconds", "Duration of a step.").labels(run)
        self._phases = self._make(
            Total, "step_phase_seconds_total", "Seconds of steps by what they went to, per replica.", "phase"
        )
        self._append = self._make(
            Histogram, "ledger_append_seconds", "Time from deciding a commit to its being on disk."
        ).labels(run)
        self._tokens = self._make(Total, "tokens_total", "Training tokens.").labels(run)
        self._probes = self._make(Total, "directions_total", "Directions probed.").labels(run)
        flows = self._make(Total, "exchanged_bytes_total", "Bytes of requests (sent) and answers (received).", "flow")
        self._sent, self._received = flows.labels(run, "sent"), flows.labels(run, "received")
        self._gradients = self._make(
            Total, "data_parallel_bytes_total", "Bytes that data-parallel training would have sent for the same steps."
        ).labels(run)
        self._nonfinite = self._make(
            Total, "nonfinite_directions_total", "Directions left out because a scalar was not finite."
        ).labels(run)
        self._clipped = self._make(Total, "clipped_directions_total", "Directions clipped.").labels(run)
        self._skipped = self._make(Total, "skipped_steps_total", "Steps without a finite probe.").labels(run)
        self._kinds = self._make(Total, "faults_total", "Faults met, by kind.", "kind")
        for kind in Counters.__slots__:
            self._kinds.labels(run, kind)
        self._lookup = Lookup(run)
        self.registry.register(self._lookup)

    def _make(self, kind: Callable[..., Any], name: str, text: str, *labels: str) -> Any:
        options = {"buckets": _SECONDS} if kind is Histogram else {}
        return kind(f"zoray_{name}", text, ("run", *labels), registry=self.registry, **options)

    def beat(self, members: Membership, state: State) -> None:
        """The coordinator's loop has turned."""
        self._alive = time.monotonic()
        self._lookup.state = state
        if state.counters is not self._faults:
            self.faults(state.counters)
        if members is self._members:
            return
        self._members = members
        self._target.set(members.target)
        phases = Counter(slot.phase for slot in members.slots.values())
        for phase in SlotPhase:
            self._replicas.labels(self._run, phase.value).set(phases[phase])

    def begin(self, step: int) -> None:
        """The run begins at a step."""
        self._step.set(step)

    def changed(self, change: Change) -> None:
        """Something became of a replica."""
        self._changes[change].inc()

    def scraped(self) -> bool:
        """Whether somebody has asked for the metrics since this was last called."""
        asked, self._lookup.asked = self._lookup.asked, False
        return asked

    def weighed(self, replica: str, memory: Mapping[str, int]) -> None:
        """A replica has said how much memory it takes: bytes by kind."""
        self._lookup.weighed(replica, memory)

    def exchanged(self, sent: int, received: int) -> None:
        """Bytes have been exchanged with a replica."""
        self._sent.inc(sent)
        self._received.inc(received)

    def evaluated(self, evaluation: Evaluation) -> None:
        """An evaluation is in."""
        self._eval_loss.labels(self._run).set(evaluation.loss)
        accuracy = evaluation.correct / evaluation.count if evaluation.count else float("nan")
        self._eval_accuracy.labels(self._run).set(accuracy)
        self._eval_score.labels(self._run).set(evaluation.score)

    def committed(self, record: StepRecord, split: Split, tokens: float, gradients: int = 0) -> None:
        """A step is committed.

        Args:
            record, split: what happened in it, and where its time went.
            tokens: of its training data.
            gradients: bytes that one replica of data-parallel training would have sent for it.
        """
        aggregate = record.aggregate
        assert aggregate is not None
        finite = [g for g in aggregate.projected_gradients if g == g]
        self._step.set(record.step + 1)
        self._committed.set_to_current_time()
        self._loss.labels(self._run).set(aggregate.commit.loss)
        self._rate.labels(self._run).set(record.learning_rate)
        rms = (sum(g * g for g in finite) / len(finite)) ** 0.5 if finite else float("nan")
        self._gradient.labels(self._run).set(rms)
        self._noise.labels(self._run).set(aggregate.disagreement)
        self._factor.labels(self._run).set(aggregate.step_factor)
        self._seconds.observe(split.total)
        self._append.observe(split.commit)
        for phase in ("probe", "commit", "wait"):
            self._phases.labels(self._run, phase).inc(getattr(split, phase))
        self._tokens.inc(tokens)
        self._gradients.inc(gradients * record.replicas)
        self._probes.inc(len(aggregate.projected_gradients))
        self._nonfinite.inc(aggregate.nonfinite)
        self._clipped.inc(aggregate.clipped)
        self._skipped.inc(0 if aggregate.commit.applied else 1)

    def faults(self, counters: Counters) -> None:
        """The kernel's fault counters so far."""
        for kind, value in asdict(counters).items():
            self._kinds.labels(self._run, kind).inc(value - getattr(self._faults, kind))
        self._faults = counters

    def serve(self, port: int) -> int:
        """Serve on a port (0: any free one) in the background; returns the port.

        Raises:
            ResourceError: the port is taken.
        """
        metrics = make_wsgi_app(self.registry)

        def app(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            if environ.get("PATH_INFO") == "/health":
                return self._health(start)
            answer: Iterable[bytes] = metrics(environ, start)
            return answer

        try:
            self._server = make_server("", port, app, _Server, _Quiet)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise ResourceError(
                f"Port {port} is {'already in use' if error.errno == errno.EADDRINUSE else 'not allowed'}.",
                where="metrics_port",
                advice="choose another port, or 0 for any free one",
            ) from error
        threading.Thread(target=self._server.serve_forever, daemon=True, name="metrics").start()
        return self._server.server_port

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _health(self, start: Callable[..., Any]) -> Iterable[bytes]:
        age = 0.0 if self._alive is None else time.monotonic() - self._alive
        well = age < _STALLED
        start("200 OK" if well else "503 Service Unavailable", [("Content-Type", "application/json")])
        return [json.dumps({"run": self._run, "ok": well, "seconds_since_last_turn": round(age, 3)}).encode()]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # A port that another process listens on must be an error, and one in TIME_WAIT must not.
    allow_reuse_address = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""
