"""`make rehearsal` on this machine: the rendered RayJob begins, is disturbed, begun again and ends as undisturbed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.cluster.helpers import ROOT
from tests.cluster.rehearsal.__main__ import obstacle

pytestmark = pytest.mark.timeout(1500)


def test_the_rendered_job_is_rehearsed() -> None:
    if (why := obstacle()) is not None:
        pytest.skip(why)
    command = [sys.executable, "-m", "tests.cluster.rehearsal"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    digests = re.findall(r"digest of the weights after .*: *([0-9a-f]{16})\n", done.stdout)
    assert len(digests) == 2 and len(set(digests)) == 1, done.stdout
