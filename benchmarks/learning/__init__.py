"""How well each method learns per forward pass: tasks, methods, a grid of runs that grows, and a report.

Every run is a unit of its own, whose curve is one line of `results.jsonl`. `python -m benchmarks.learning` makes those
that are missing, most wanted first; `--report` writes what they say.
"""
