"""`benchmarks.train precision`: a training step in bfloat16 against one in float32, on this processor and on one without it.

The other processor is this one, limited by the environment: oneDNN (`ONEDNN_MAX_CPU_ISA`), torch's own kernels
(`ATEN_CPU_CAPABILITY`) and MKL may use AVX2 only. Each is a process of its own, in which both types take the same batches, one
after the other. What `traceir train` would choose there is asked in the same process, and must be the faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any, Final

import torch
from tqdm import tqdm

from benchmarks.train_shapes import machine
from traceir.errors import TraceError
from traceir.lab.mini_presets import PRESETS
from traceir.precision import GAIN, bfloat16_on
from traceir.train.gradcache import Objective, step
from traceir.train.train import Run, accelerated, joined

AVX2: Final = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
PROCESSORS: Final = {"as it is": {}, "limited to AVX2": AVX2}
TYPES: Final = ("bfloat16", "float32")


def precision(options: argparse.Namespace) -> dict[str, Any]:
    """Both types on both processors; each in a child process."""
    command = [sys.executable, "-m", "benchmarks.train", "precision", "--child", "--preset", options.preset]
    command += ["--data", str(options.data), "--batch", str(options.batch), "--rounds", str(options.rounds)]
    command += ["--threads", str(options.threads), "--seed", str(options.seed), "--width", str(options.width)]
    measured: dict[str, Any] = {}
    for name, limits in tqdm(PROCESSORS.items(), desc="processors"):
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=os.environ | limits)
        if done.returncode:
            raise TraceError(f"the process on the processor {name} ended with status {done.returncode}")
        measured[name] = json.loads(done.stdout)
    width = options.width or PRESETS[options.preset]().size.hidden
    config = {"preset": options.preset, "width": width, "batch": options.batch, "rounds": options.rounds}
    data = json.loads((options.data / "meta.json").read_text()).get("fingerprint")
    return {"format": 1, "measurement": "precision", "machine": machine("cpu"), "config": config, "seed": options.seed,
            "data": data, "found": measured}  # fmt: skip


def child(options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of each batch forward and backward in both types, without the first, which warms up."""
    preset = PRESETS[options.preset]()
    if options.width:
        size = replace(preset.size, hidden=options.width, inner=3 * options.width, heads=options.width // 32)
        preset = replace(preset, size=size)
    with tempfile.TemporaryDirectory() as scratch:
        config = replace(
            preset, data=str(options.data), out=scratch, cache="", init="random", steps=options.rounds + 1,
            batch=options.batch, seed=options.seed, mixed_precision=False,
        )  # fmt: skip
        joined(config)
        run = Run(config, accelerated(config))
        reader, batches, speed = run.reader.train(), run.batches(), bfloat16_on("cpu", run.model.width)
        spent_s: dict[str, list[float]] = {name: [] for name in TYPES}
        for number in range(options.rounds + 1):
            batch = batches[number]
            for name in TYPES:
                began = time.process_time()
                with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
                    step(reader, batch, Objective(), cache=config.grad_cache)
                reader.zero_grad(set_to_none=True)
                if number:
                    spent_s[name].append(time.process_time() - began)
    ratios = [half / full for half, full in zip(*spent_s.values(), strict=True)]
    return {
        **{name: statistics.median(spent) for name, spent in spent_s.items()},
        "ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
        "greatest_ratio": max(ratios),
        "chosen": "bfloat16" if speed.fast else "float32",
        "why": speed.why,
    }


def wrong(results: dict[str, Any]) -> list[str]:
    """The processors on which the default loses to the other type; float32 may lose what bfloat16 must gain."""
    return [name for name, row in results["found"].items() if (row["ratio"] * GAIN > 1 and row["chosen"] == "bfloat16")
            or (row["ratio"] < GAIN and row["chosen"] == "float32")]  # fmt: skip


def table(results: dict[str, Any]) -> str:
    about, config = results["machine"], results["config"]
    lines = [
        f"`python -m benchmarks.train precision`: preset {config['preset']}, width {config['width']}, batch {config['batch']}, "
        f"{config['rounds']} batches, forward and backward (CPU s), seed {results['seed']}, data {str(results['data'])[:16]}. "
        f"{about['processor']}, {about['cores']} cores, {about['threads']} thread(s), torch {about['torch']}, transformers "
        f"{about['transformers']}.",
        "",
        "| processor | bfloat16 s | float32 s | bfloat16 : float32 | least | greatest | default | because |",
        "|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for name, row in results["found"].items():
        lines.append(
            f"| {name} | {row['bfloat16']:.2f} | {row['float32']:.2f} | **{row['ratio']:.2f}** | {row['least_ratio']:.2f} "
            f"| {row['greatest_ratio']:.2f} | {row['chosen']} | {row['why']} |"
        )
    return "\n".join(lines)
