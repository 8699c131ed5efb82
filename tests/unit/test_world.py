"""What a sharded replica's processes have beside their weights: a world, a folder, and words for what goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from tests.unit.test_config import config
from zoray.errors import ConfigError
from zoray.memory.scratch import claim
from zoray.memory.shortage import explain, out_of_memory
from zoray.memory.world import Meeting, form, lost_touch

HOLD = "import sys, zoray.memory.scratch as s; print(s.claim(sys.argv[1], 'r7'), flush=True); sys.stdin.read()"

GROUP = """
import datetime, os, signal, sys, torch
from torch import distributed
from zoray.memory.world import form, lost_touch
on_devices = sys.argv[3] == "nccl"
form(sys.argv[1], int(sys.argv[2]), 2, on_devices, datetime.timedelta(seconds=int(sys.argv[4])))
total = torch.ones(4, device="cuda" if on_devices else "cpu")
distributed.all_reduce(total)
print(int(total.sum()), flush=True)
if sys.argv[2] == "1":
    # Told to die, or to stay away.
    if sys.stdin.read() == "":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
try:
    distributed.all_reduce(total)
    total.cpu()
except Exception as error:
    print(lost_touch(error), lost_touch(ValueError(str(error))), flush=True)
"""


def test_a_folder_is_its_processs_own_and_gone_after_it(tmp_path: Path) -> None:
    place = str(tmp_path / "fast" / "disk")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    theirs = Path(process.stdout.readline().strip())
    users = Path(place) / "zoray-models"
    users.mkdir()
    mine = claim(place, "r8")
    assert theirs.is_dir() and mine.is_dir() and mine != theirs and "r7" in theirs.name
    process.kill()
    process.communicate()
    assert theirs.is_dir()
    claim(place, "r9")
    assert not theirs.exists() and mine.is_dir() and users.is_dir()


def test_two_users_share_a_place(tmp_path: Path) -> None:
    other = tmp_path / f".zoray-{os.getuid() + 1}" / "r0-abc"
    other.mkdir(parents=True)
    assert claim(str(tmp_path), "r0").is_dir() and other.is_dir()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be kept in files") as caught:
        claim(str(tmp_path / "file"), "r0")
    assert "memory.nvme_path" in str(caught.value.where)


@pytest.mark.parametrize("word", ["", "stay away"], ids=["dies", "stays-away"])
def test_processes_meet_and_notice_that_one_is_gone(word: str) -> None:
    meeting = Meeting("127.0.0.1")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", GROUP, meeting.place, str(rank), "gloo", "3"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "8\n"
        assert processes[1].stdin is not None
        processes[1].stdin.write(word)
        processes[1].stdin.close()
        out, _ = processes[0].communicate(timeout=60)
        assert out == "True False\n"
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_errors_of_ones_own_are_not_a_lost_touch() -> None:
    assert not lost_touch(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost_touch(ConnectionError("gloo/transport"))
    assert lost_touch(distributed.DistNetworkError("the server closed the connection"))
    assert not distributed.is_initialized() and callable(form)


def test_the_allocators_errors_are_told_with_numbers_and_knobs() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**52)
    assert out_of_memory(caught.value) and out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("shape mismatch"))
    error = explain(caught.value, config(signs="sequential"), "replica r0, a forward", batched=False)
    assert f"{2**54 / 2**30:.2f} GiB more were asked for" in error.what and "free" in error.what
    assert "replica r0, a forward" in error.what and "sequential" not in str(error.advice)
    for words in ("per_direction_batch_size than 4", "shards: 2", "offload: nvme", "dtype: bfloat16", "zoray plan"):
        assert words in str(error.advice)


def test_knobs_that_are_turned_already_are_not_named() -> None:
    memory = {"kind": "zero3", "shards": 4, "offload": "nvme", "nvme_path": "/fast"}
    loading = explain(MemoryError(), config(memory=memory, dtype="bfloat16"), "replica r0, loading", batched=None)
    assert "MemoryError" in loading.what and "shards: 8" in str(loading.advice)
    for words in ("signs", "per_direction", "offload", "dtype", "fewer replicas"):
        assert words not in str(loading.advice)
    derivatives = str(
        explain(
            MemoryError(),
            config(estimator="backprop", learning_rate=1e-6, optimizer={"normalize": "none"}),
            "a forward",
            batched=False,
        ).advice
    )
    assert "estimator: spsa" in derivatives and "memory:" not in derivatives and "fewer replicas" in derivatives
    assert "signs: sequential" in str(explain(MemoryError(), config(), "a forward", batched=True).advice)
