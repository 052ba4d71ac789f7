"""Do several processes train what one does, and does a killed run go on as if nothing had been?

`python -m benchmarks.processes --report docs/results/processes.md` trains the bundled model for a few steps on the small
MiniBEIR: once in one process, and by torchrun over gloo with DDP and with shards, undisturbed and killed. Loss and weights after
the first and the last step are compared with those of the one process; the killed run, resumed by the same command, with the
undisturbed one. Ends in error where a difference is above `--at-most`, or a resumed run is not equal to the last bit. Runs that
are finished in `--out` are compared again, not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from traceir.checkpoint import bundled_model

STEPS, KILLED_AT = 4, 2
SETTINGS = (
    f"steps={STEPS}", "save_every=1", "keep=1", "log_every=1", "batch=16", "group=4", "warmup=1", "augment=0", "grad_cache=true",
    "chunk_tokens=512", "mixed_precision=false", "learn_temperature=true", "threads=1",
)  # fmt: skip
WAYS = {
    "all weights": (),
    "all weights, matrices apart": (),
    "LoRA": ("lora_rank=8", "lora_alpha=16"),
    "LoRA, base in bfloat16": ("lora_rank=8", "lora_alpha=16", "dtype=bfloat16"),
}
"""What trains -> its settings; apart are input and output matrix, which are one in the bundled model."""


HEAD = """\
# Several processes against one

    python -m benchmarks.processes --report docs/results/processes.md

The bundled model, {steps} steps of 16 pairs of the small MiniBEIR in chunks of 512 tokens with GradCache and a learnt
temperature, in float32 but for the base where it says bfloat16; torchrun over gloo, one thread a process. Differences are from
the same run in one process, after the first step and after the last: of any term of the loss, relative to it (`log.jsonl` has
six decimals), and of any weight, relative to the largest of its tensor. AdamW's first steps are as long where a gradient is
near zero as elsewhere, so rounding shows there, and in bfloat16 it grows from step to step; the gradients themselves are
compared in float64 by `tests/test_gradcache.py`. Killed by SIGKILL at step {killed} or later, the launcher too where it says
all; resumed by the same command. Equal: every line of `log.jsonl` but for `seconds`, and every bit of the weights. torch
{torch}, {machine}.

| what trains | launch | processes | loss, 1st step | any step | weights, 1st step | last step | killed | resumed |
|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True, slots=True)
class Launch:
    way: str
    processes: int
    sharded: bool
    victims: str

    @property
    def name(self) -> str:
        return f"{self.way}-{'shards' if self.sharded else 'ddp'}-{self.processes}".replace(",", "").replace(" ", "-")


LAUNCHES = (
    Launch("all weights", 4, False, "all"),
    Launch("all weights", 2, True, "one"),
    Launch("all weights", 4, True, "all"),
    Launch("all weights, matrices apart", 2, True, "all"),
    Launch("LoRA", 4, False, "one"),
    Launch("LoRA", 2, True, "all"),
    Launch("LoRA, base in bfloat16", 2, False, "all"),
    Launch("LoRA, base in bfloat16", 2, True, "one"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """Differences from the one process after the first and the last step: of any term of the loss, and of any weight."""

    launch: Launch
    loss: tuple[float, float]
    weights: tuple[float, float]
    resumed: bool

    @property
    def greatest(self) -> float:
        """What the bound is for; in bfloat16 the first step alone, since later ones magnify its rounding."""
        steps = 1 if "bfloat16" in self.launch.way else 2
        return max(*self.loss[:steps], *self.weights[:steps])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", default="out/processes", metavar="DIR")
    parser.add_argument("--report", metavar="FILE", help="write the page there, too")
    parser.add_argument("--only", metavar="TEXT", default="", help="launches whose name holds TEXT, such as LoRA-shards")
    parser.add_argument("--at-most", type=float, default=1e-2, metavar="R", help="greatest difference (default: 0.01)")
    args = parser.parse_args(arguments)
    chosen = [launch for launch in LAUNCHES if args.only in launch.name]
    out = Path(args.out)
    prepare(out)
    rows = [measured(launch, out) for launch in chosen]
    page = report(rows)
    print(page)
    if args.report:
        Path(args.report).write_text(page)
    return 0 if all(row.resumed and row.greatest <= args.at_most for row in rows) else 1


def prepare(out: Path) -> None:
    """Data, and the start whose matrices are apart."""
    if not (out / "data/meta.json").is_file():
        run(
            [sys.executable, "-m", "traceir", "minibeir", "build", "--scale", "small", "--out", str(out / "data")],
            out / "build.txt",
        )
    if not (out / "apart/traceir.json").is_file():
        from traceir.model import load, save

        model = load(bundled_model())
        head = model.network.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        for config in (model.network.config, model.network.config.text_config):
            config.tie_word_embeddings = False
        save(model, out / "apart")


def measured(launch: Launch, out: Path) -> Row:
    alone = out / "runs" / launch.way.replace(",", "").replace(" ", "-")
    whole, killed = out / "runs" / launch.name, out / "runs" / f"{launch.name}-killed"
    if not finished(alone):
        run(command(launch.way, 1, False, alone, out), out / "alone.txt")
    if not finished(whole):
        run(command(launch.way, launch.processes, launch.sharded, whole, out), out / "whole.txt")
    if not finished(killed):
        again = command(launch.way, launch.processes, launch.sharded, killed, out)
        kill(again, killed, launch.victims, out / "killed.txt")
        run(again, out / "resumed.txt")
    loss = difference_of_logs(alone, whole)
    weights = difference(alone / "steps/000001", whole / "steps/000001"), difference(alone / "checkpoint", whole / "checkpoint")
    row = Row(
        launch, loss, weights, curve(whole) == curve(killed) and difference(whole / "checkpoint", killed / "checkpoint") == 0
    )
    print(row, file=sys.stderr)
    return row


def command(way: str, processes: int, sharded: bool, run_folder: Path, out: Path) -> list[str]:
    init = out / "apart" if "apart" in way else bundled_model()
    asked = [
        "-m",
        "traceir",
        "train",
        "--preset",
        "emoji",
        "--data",
        str(out / "data"),
        "--init",
        str(init),
        "--out",
        str(run_folder),
    ]
    for setting in (*SETTINGS, *WAYS[way], f"cache={out / 'pixels'}", f"shard={str(sharded).lower()}"):
        asked += ["--set", setting]
    if processes == 1:
        return [sys.executable, *asked]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *asked]


def run(command: Sequence[str], log: Path) -> None:
    """Runs to the end; what it says goes into a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        code = subprocess.run(command, stdout=stream, stderr=stream, env=environment()).returncode
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}; see {log}")


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def kill(command: Sequence[str], run_folder: Path, victims: str, log: Path) -> None:
    """Starts, and after some steps kills one process of the training, or all of them and what launched them, by SIGKILL."""
    with log.open("wb") as stream:
        launcher = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment())
        deadline = time.monotonic() + 600
        while newest_step(run_folder) < KILLED_AT and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        workers = children(launcher.pid)
        if launcher.poll() is not None or not workers:
            raise SystemExit(f"{run_folder} ended before it could be killed; see {log}")
        for victim in workers[-1:] if victims == "one" else [launcher.pid, *workers]:
            os.kill(victim, signal.SIGKILL)
        launcher.wait()
    if finished(run_folder):
        raise SystemExit(f"{run_folder} was finished when it was killed: nothing was tried")


def finished(run_folder: Path) -> bool:
    return (run_folder / "checkpoint").is_dir()


def newest_step(run_folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return max((int(folder.name) for folder in (run_folder / "steps").glob("[0-9]*")), default=0)
    return 0


def children(process: int) -> list[int]:
    """Ids of the processes that a process has started (Linux)."""
    pids: list[int] = []
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        pids += map(int, thread.read_text().split())
    return sorted(pids)


def difference(first: Path, second: Path) -> float:
    """The greatest difference of any weight, relative to the largest of its tensor."""
    (name,) = (file.name for file in first.glob("*model.safetensors"))
    weights, other = load_file(first / name), load_file(second / name)
    if weights.keys() != other.keys():
        raise SystemExit(f"{first} and {second} hold other tensors: {sorted(weights.keys() ^ other.keys())[:4]}")
    return max(float((weights[n] - other[n]).abs().max() / weights[n].abs().max().clamp_min(1e-30)) for n in weights)


def difference_of_logs(first: Path, second: Path) -> tuple[float, float]:
    """The greatest relative difference of any term of the loss: in the first line of the log, and in any."""
    differences: list[float] = []
    for line, other in zip(curve(first), curve(second), strict=True):
        terms = [name for name in line if "/" in name]
        differences.append(max(abs(line[name] - other[name]) / max(abs(line[name]), 1e-9) for name in terms))
    return differences[0], max(differences)


def curve(run_folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def report(rows: Sequence[Row]) -> str:
    lines = [HEAD.format(steps=STEPS, killed=KILLED_AT, torch=torch.__version__, machine=platform.machine())]
    for row in rows:
        launch = row.launch
        figures = " | ".join(f"{figure:.0e}" for figure in (*row.loss, *row.weights))
        mode = "shards (FSDP2)" if launch.sharded else "DDP"
        equal = "equal" if row.resumed else "**not equal**"
        lines.append(f"| {launch.way} | {mode} | {launch.processes} | {figures} | {launch.victims} | {equal} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
