"""What each alert must and must not fire on, as time series of one value a minute in promtool's notation."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """`series` by name and labels; whether `alert` fires at `minute`."""

    alert: str
    fires: bool
    minute: int
    series: dict[str, str]


def stalled(last: str, seconds: str, steps: str, committed: str, longest: str = "100+0x90") -> dict[str, str]:
    return {
        "zoray_last_commit_timestamp_seconds": last,
        "zoray_step_duration_seconds_sum": seconds,
        "zoray_step_duration_seconds_count": steps,
        "zoray_committed_steps": committed,
        "zoray_max_steps": longest,
    }


def lost(events: str, target: int) -> dict[str, str]:
    return {'zoray_replica_events_total{event="lost"}': events, "zoray_target_replicas": f"{target}+0x60"}


def finite(bad: str, probed: str, skipped: str = "0+0x60") -> dict[str, str]:
    return {
        "zoray_nonfinite_directions_total": bad,
        "zoray_directions_total": probed,
        "zoray_skipped_steps_total": skipped,
    }


def append(fast: str, slow: str) -> dict[str, str]:
    name = "zoray_ledger_append_seconds_bucket"
    return {
        f'{name}{{le="0.03"}}': fast,
        f'{name}{{le="0.3"}}': fast,
        f'{name}{{le="1"}}': slow,
        f'{name}{{le="+Inf"}}': slow,
    }


CASES = (
    # A step a second until the tenth minute, then none.
    Case("ZorayRunStalled", True, 30, stalled("0+60x10 600+0x80", "0+60x90", "0+60x90", "0+1x10 10+0x80")),
    Case("ZorayRunStalled", False, 20, stalled("0+60x10 600+0x80", "0+60x90", "0+60x90", "0+1x10 10+0x80")),
    # Never a step: there is no mean to compare with.
    Case("ZorayRunStalled", True, 20, stalled("0+0x90", "0+0x90", "0+0x90", "0+0x90")),
    # Steps of ten minutes, and one that takes forty; a run at its last step; one that goes on.
    Case("ZorayRunStalled", False, 50, stalled("600+0x90", "600+0x90", "1+0x90", "1+0x90")),
    Case("ZorayRunStalled", False, 60, stalled("600+0x90", "1+0x90", "1+0x90", "100+0x90")),
    Case("ZorayRunStalled", False, 60, stalled("0+60x90", "0+60x90", "0+60x90", "0+1x90")),
    Case("ZorayNoReplicas", True, 15, {'zoray_replicas{state="active"}': "2+0x5 0+0x30"}),
    Case("ZorayNoReplicas", False, 9, {'zoray_replicas{state="active"}': "2+0x5 0+0x3 2+0x30"}),
    Case("ZorayNoReplicas", False, 15, {'zoray_replicas{state="starting"}': "0+0x30"}),
    Case("ZorayReplicaFlapping", True, 15, lost("0+1x60", 2)),
    Case("ZorayReplicaFlapping", False, 15, lost("0+0x5 1+0x3 2+0x50", 2)),
    Case("ZorayReplicaFlapping", False, 15, lost("0+1x60", 100)),
    Case("ZorayDigestDisagreement", True, 10, {'zoray_faults_total{kind="diverged"}': "0+0x5 1+0x30"}),
    Case("ZorayDigestDisagreement", False, 10, {'zoray_faults_total{kind="diverged"}': "1+0x30"}),
    Case("ZorayDigestDisagreement", False, 10, {'zoray_faults_total{kind="late"}': "0+1x30"}),
    Case("ZorayNonFiniteScalars", True, 15, finite("0+1x60", "0+16x60")),
    Case("ZorayNonFiniteScalars", True, 15, finite("0+0x60", "0+1600x60", "0+0x8 1+0x50")),
    Case("ZorayNonFiniteScalars", False, 15, finite("0+1x60", "0+1600x60")),
    Case("ZorayLedgerWriteSlow", True, 30, append("0+1x60", "0+10x60")),
    Case("ZorayLedgerWriteSlow", False, 30, append("0+10x60", "0+10x60")),
    # Slow for some minutes only.
    Case("ZorayLedgerWriteSlow", False, 40, append("0+10x20 200+0x3 200+10x40", "0+10x63")),
    Case("ZorayLossDiverging", True, 95, {"zoray_loss": "2+0x60 3+0x60"}),
    Case("ZorayLossDiverging", False, 95, {"zoray_loss": "4-0.01x120"}),
    Case("ZorayLossDiverging", False, 95, {"zoray_loss": "2+0x60 2.3+0x60"}),
    # A burst that is over within minutes.
    Case("ZorayLossDiverging", False, 75, {"zoray_loss": "2+0x60 6+0x3 2+0x60"}),
    Case("ZorayLossDiverging", True, 60, {"zoray_loss": "2+0x90", "zoray_eval_loss": "2+0x30 2.5+0x60"}),
    # Another pod goes on with the run: one run, one history.
    Case("ZorayLossDiverging", True, 95, {'zoray_loss{pod="a"}': "2+0x60", 'zoray_loss{pod="b"}': "_x60 3+0x60"}),
)
