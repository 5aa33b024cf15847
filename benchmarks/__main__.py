"""`make bench`: every measurement, each in a process of its own, one after the other. About 35 minutes on two cores."""

import subprocess
import sys

MODULES = (
    "startup",
    "order",
    "prepare",
    "tokenize",
    "goodput",
    "survive",
    "train_speed",
    "masked_speed",
    "zero",
    "generate",
)


def main() -> None:
    """Run them; the first that fails ends it."""
    for name in MODULES:
        print(f"\n## python -m benchmarks.{name}\n", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
