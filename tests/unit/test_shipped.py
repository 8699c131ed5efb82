"""What is shipped beside the code: every configuration loads, and help is light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from zoray.config import load

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    config = load(str(path), [])
    assert config.task.eval is not None
    assert config.threads_per_replica == 1, "shipped runs must be comparable byte for byte"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['zoray', '--help']\nfrom launch.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'pydantic', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert "resume" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == "[]"
