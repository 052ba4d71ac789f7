"""One side of a swap in a process of its own, which `benchmarks.swaps` starts: the work of swaps_search.py and swaps_files.py.

A measure gets a ROLE and SETTINGS, makes its data, warms up, and gives what can be asked by name. ROLE is `before` or `after`,
whose package PYTHONPATH names, or for libraries that were refused `ours` and `library`, over one revision. The process prints the
names; for each name that it then reads it does the work and prints CPU seconds (its own and those of its children, or what the
work says it `Spent`), a digest of what came out (null where the two sides draw at random) and its peak memory in MB.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

Settings = dict[str, Any]
Asks = dict[str, Callable[[], object]]


def cpu(children_first: bool) -> float:
    """CPU seconds of this process and of its children, ended or not. Looking at children costs some, which is kept out of a span
    that begins with `children_first` and ends without."""
    parts = [_of_children, cpu_of_itself] if children_first else [cpu_of_itself, _of_children]
    return sum(part() for part in parts)


def cpu_of_itself() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def _of_children() -> float:
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(part.user + part.system for part in times)


@dataclass(frozen=True)
class Spent:
    """CPU seconds of the process that is measured, where this one only drives it."""

    seconds: float


def peak_mb() -> int:
    """Of this process; `ru_maxrss` would be at least that of whoever started it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1000


def warmed(asks: Asks) -> Asks:
    for ask in asks.values():
        ask()
    return asks


def main(module: str, measure: str, role: str, text: str) -> None:
    # What the code under measurement prints, and what it starts, must not be taken for an answer.
    answers_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asks = getattr(import_module(f"benchmarks.{module}"), measure)(role, json.loads(text))
    print(json.dumps(list(asks)), file=answers_to, flush=True)
    for name in sys.stdin:
        begun = cpu(children_first=True)
        came_out = asks[name.strip()]()
        spent = cpu(children_first=False) - begun
        if isinstance(came_out, Spent):
            spent, came_out = came_out.seconds, None
        digest = None if came_out is None else hashlib.sha256(repr(came_out).encode()).hexdigest()
        print(json.dumps([spent, digest, peak_mb()]), file=answers_to, flush=True)
    os._exit(0)  # threads of libraries that are still open would be waited for
