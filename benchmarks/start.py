"""What a command costs before it does its work: CPU time of one search and one image added, against importing torch alone.

`python -m benchmarks.start --at-most 1.6` starts each in turn, several times, and compares medians of user and system time; with
one thread, on the bundled model.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

TORCH = "import torch"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="times each is started (default: 7)")
    parser.add_argument("--at-most", type=float, metavar="R", help="end with 1 where a ratio is above this")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        image, index = Path(scratch) / "red.png", Path(scratch) / "index"
        Image.new("RGB", (640, 480), (200, 30, 30)).save(image)
        sides = {
            "import torch": [sys.executable, "-c", TORCH],
            "index add": [sys.executable, "-m", "traceir", "index", "add", str(image), "--index"],
            "search": [sys.executable, "-m", "traceir", "search", "--index", str(index), "--image", str(image)],
        }
        spent: dict[str, list[float]] = {name: [] for name in sides}
        cpu_seconds([*sides["index add"], str(index)])
        for number in range(args.rounds):
            for name, command in sides.items():
                spent[name].append(cpu_seconds([*command, f"{index}-{number}"] if name == "index add" else command))
    base = statistics.median(spent["import torch"])
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {args.rounds} rounds, medians")
    worst = 0.0
    for name, seconds in spent.items():
        middle = statistics.median(seconds)
        worst = max(worst, middle / base)
        print(f"{name:13} {middle:5.2f} s of CPU ({min(seconds):.2f} to {max(seconds):.2f}), {middle / base:.2f} of import torch")
    return 1 if args.at_most is not None and worst > args.at_most else 0


def cpu_seconds(command: Sequence[str]) -> float:
    """User and system time of one process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
