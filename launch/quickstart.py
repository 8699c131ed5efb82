"""`make quickstart`: make the data, then run `configs/quickstart.yaml` as any run is run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Write the quickstart's data if they are not there, then hand over to `zoray train`."""
    folder = ROOT / "configs" / "quickstart"
    if not (folder / "data" / "eval.jsonl").exists():
        subprocess.run([sys.executable, str(folder / "make_data.py")], check=True)
    from launch.cli import main as zoray

    sys.argv = ["zoray", "train", str(ROOT / "configs" / "quickstart.yaml"), *sys.argv[1:]]
    zoray()


if __name__ == "__main__":
    main()
