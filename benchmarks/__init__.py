"""Measurements: `python -m benchmarks` runs all of them, each module alone runs its own."""
