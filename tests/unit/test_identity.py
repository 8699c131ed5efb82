"""Identities: everything that would change what is computed is noticed, and named."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from zoray import __version__
from zoray.config import RunConfig
from zoray.errors import LedgerError, RunError
from zoray.identity import (
    Identity,
    check_base,
    check_header,
    check_newcomer,
    code_digest,
    config_digest,
    header_digest,
    identify,
    ledger_header,
)
from zoray.proof import Verdict
from zoray.replica import Replica

IDENTITY = Identity("0.1.0", "c0de", "c0f1", "ba5e", "1a40", "da7a", Verdict(True, False, reasons=("why",)))
OTHER: dict[str, Any] = {
    "version": "9", "code": "x", "config": "x", "base": "x", "layout": "x", "data": "x",
    "verdict": Verdict(False, False), "objective": "accuracy",
}  # fmt: skip


class FakeTask:
    num_labels = 2
    id2label: ClassVar = {0: "bad", 1: "good"}

    def texts(self, run_seed: int) -> None:
        return None


def config(**keys: Any) -> RunConfig:
    task = {"kind": "causal_lm", "train": "t"}
    return RunConfig.model_validate(
        {"model": "m", "max_steps": 9, "task": task, "lr_scheduler_type": "constant", **keys}
    )


def header(**keys: Any) -> dict[str, Any]:
    """As it comes back from the ledger's file."""
    return json.loads(json.dumps(ledger_header(config(**keys), IDENTITY, FakeTask())))  # type: ignore[arg-type]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def replica(of: nn.Module) -> Replica:
    return Replica(of, 0)


def test_equal_replicas_shake_hands() -> None:
    IDENTITY.check(replace(IDENTITY), "r1")


@pytest.mark.parametrize("field", list(OTHER))
def test_each_difference_is_refused_and_named(field: str) -> None:
    with pytest.raises(RunError, match="r1 has another") as caught:
        IDENTITY.check(replace(IDENTITY, **{field: OTHER[field]}), "r1")
    assert caught.value.where == f"handshake, {field}"


def test_a_header_knows_its_own() -> None:
    check_header(header(), IDENTITY, config(), "here")


def test_harmless_keys_may_change() -> None:
    check_header(header(), IDENTITY, config(replicas=7, save_steps=3, max_steps=99, metrics_port=1), "here")


@pytest.mark.parametrize(
    ("key", "value"), [("epsilon", 0.5), ("directions", 3), ("seed", 1), ("dtype", "bfloat16"), ("trainable", "w")]
)
def test_mathematical_keys_may_not(key: str, value: Any) -> None:
    with pytest.raises(LedgerError, match=f"made with {key} = ") as caught:
        check_header(header(), IDENTITY, config(**{key: value}), "here")
    assert caught.value.where == f"here, {key}"


def test_max_steps_may_not_change_where_the_schedule_depends_on_it() -> None:
    old = header(lr_scheduler_type="linear")
    with pytest.raises(LedgerError, match="max_steps"):
        check_header(old, IDENTITY, config(lr_scheduler_type="linear", max_steps=10), "here")


@pytest.mark.parametrize(
    ("field", "word"), [("base", "base model"), ("layout", "set of parameters"), ("data", "data"), ("verdict", "path")]
)
def test_other_files_are_refused(field: str, word: str) -> None:
    with pytest.raises(LedgerError, match=f"another {word}") as caught:
        check_header(header(), replace(IDENTITY, **{field: OTHER[field]}), config(), "here")
    assert caught.value.where == f"here, identity.{field}"


def test_another_version_may_resume() -> None:
    check_header(header(), replace(IDENTITY, version="9", code="x"), config(), "here")


def test_a_newcomer_has_this_process_s_code_and_configuration() -> None:
    mine = replace(IDENTITY, version=__version__, code=code_digest(), config=config_digest(config()))
    check_newcomer(mine, config(replicas=9, eval_on_start=False), "r3")
    for field in ("version", "code", "config"):
        with pytest.raises(RunError, match="r3 has another") as caught:
            check_newcomer(replace(mine, **{field: "x"}), config(), "r3")
        assert caught.value.where == f"handshake, {field}"
    with pytest.raises(RunError, match="another configuration"):
        check_newcomer(mine, config(epsilon=0.5), "r3")


def test_the_base_model_is_all_of_the_model() -> None:
    original, frozen = model(), model()
    frozen[0].requires_grad_(False)
    head = {"identity": {"base": "", "layout": replica(original).layout.identity}}
    base = replica(original)
    from zoray.replica import base_digest

    head["identity"]["base"] = f"{base_digest(original):016x}"
    check_base(head, base, "here")
    changed = model()
    with torch.no_grad():
        changed[1].bias[0] += 1
    with pytest.raises(LedgerError, match="its base is") as caught:
        check_base(head, replica(changed), "here")
    assert "`model`" in str(caught.value.advice)
    with pytest.raises(LedgerError, match="its layout is"):
        check_base(head, replica(frozen), "here")


def test_an_identity_is_that_of_a_proved_replica() -> None:
    one = replica(model())
    with pytest.raises(AssertionError):
        identify(one, "d", config())


def test_header_digests_tell_runs_apart_and_do_not_depend_on_order() -> None:
    assert header_digest(header()) == header_digest(dict(reversed(header().items())))
    assert len({header_digest(header(seed=seed)) for seed in range(20)}) == 20
