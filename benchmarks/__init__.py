"""What RESULTS.md quotes: `python -m benchmarks` runs everything, one module alone its own section."""
