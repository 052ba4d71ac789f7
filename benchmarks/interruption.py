"""Is an evaluation the same to the last hit after kill -9, and whatever the number of shards?

`python -m benchmarks.interruption --data DIR` runs `traceir evaluate` once without a break; then again, killed at random moments
until it ends by itself; then in 2 and in 3 shards, one after the other in a random order. Every file of ranks and hits must have
the same bytes, and results.json the same numbers but for speeds. Ends in error if one differs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

SPEEDS = ("queries_per_second", "candidates_per_second")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model")
    parser.add_argument("--rows")
    parser.add_argument("--route", default="auto")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--kills", type=int, default=8, help="give up killing after so many, so that it ends (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out/interruption")
    options = parser.parse_args()
    draw, out = random.Random(options.seed), Path(options.out)
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "traceir.cli.main", "--threads", "1", "evaluate", "--data", options.data, "--pool", "both"]
    command += ["--route", options.route]
    for name in ("model", "rows", "limit"):
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    started = time.monotonic()
    subprocess.run([*command, "--out", str(out / "whole")], check=True, capture_output=True)
    whole = time.monotonic() - started
    kills = kill_and_resume([*command, "--out", str(out / "killed")], draw, whole, options.kills)
    print(
        f"uninterrupted {whole:.0f} s; killed {kills} times, then run to its end; torch {torch.__version__}, seed {options.seed}"
    )
    same = [report("killed", differences(out / "whole", out / "killed"))]
    for count in (2, 3):
        order = draw.sample(range(count), count)
        for number in order:
            folder = str(out / f"shards-{count}")
            subprocess.run([*command, "--out", folder, "--shard", f"{number}/{count}"], check=True, capture_output=True)
        same.append(report(f"{count} shards, in the order {order}", differences(out / "whole", out / f"shards-{count}")))
    return 0 if all(same) else 1


def kill_and_resume(command: list[str], draw: random.Random, seconds: float, kills: int) -> int:
    """Runs a command, each time killed at a random moment, at last to its end; returns how often it was killed."""
    for killed in range(kills + 1):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if process.wait(draw.uniform(0.25, 0.6) * seconds if killed < kills else None) == 0:
                return killed
            raise SystemExit(f"the evaluation ended with {process.returncode}")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    return kills


def differences(whole: Path, other: Path) -> list[str]:
    """Names of the files that are not the same."""
    names = sorted(
        {
            file.relative_to(root).as_posix()
            for root in (whole, other)
            for file in root.rglob("*")
            if file.suffix in (".jsonl", ".txt")
        }
        - {""}
    )
    names = [name for name in names if not name.startswith("embeddings")]
    different = [name for name in names if not (whole / name).is_file() or not (other / name).is_file()]
    different += [name for name in names if name not in different and (whole / name).read_bytes() != (other / name).read_bytes()]
    return different + (["results.json"] if untimed(whole) != untimed(other) else [])


def untimed(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    for pool in ("routes", "global"):
        for rows in results[pool].values():
            for row in rows.values():
                for name in SPEEDS:
                    row.pop(name, None)
    return results


def report(what: str, different: list[str]) -> bool:
    print(f"{what}: {'the same to the last hit' if not different else 'DIFFERENT: ' + ', '.join(different)}", flush=True)
    return not different


if __name__ == "__main__":
    raise SystemExit(main())
