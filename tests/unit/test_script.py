"""The README's plain script, as a user would run it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "plain.py"


def test_the_plain_script_learns(tmp_path: Path) -> None:
    model = ROOT / "configs" / "quickstart" / "model"
    command = [sys.executable, SCRIPT, model, "11"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    before, after = (float(value) for value in re.findall(r"loss ([0-9.]+)", done.stdout))
    assert after < before - 0.1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain-model").num_parameters() > 10**6


def test_the_readme_quotes_it_whole() -> None:
    code = SCRIPT.read_text().split("\n\n", 1)[1]
    assert code in (ROOT / "README.md").read_text()
