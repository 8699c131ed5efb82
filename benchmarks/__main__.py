"""`make bench`: all benchmarks, one after the other, each in a process of its own."""

import subprocess
import sys

for name in ("core", "memory", "plan", "shards", "offload", "cluster", "elastic", "metrics", "submit"):
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], check=True)
