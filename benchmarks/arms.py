"""What a step of `mini` costs against a step of its baseline without reasoning: CPU time, batch by batch in one process.

`python -m benchmarks.arms` makes the same batches for both presets and takes each forward and backward, one after the other. The
ratio says how many more updates the baseline `mini-direct-long` needs to have cost as much.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from traceir.lab.mini_presets import preset
from traceir.precision import bfloat16_on
from traceir.train.gradcache import Objective, step
from traceir.train.train import Run, accelerated, joined

WARM, BATCHES = 30, 60


def main() -> int:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as scratch:
        sides = []
        for name, arm in (("ours", "mini"), ("direct", "mini-direct")):
            config = replace(preset(arm), out=str(Path(scratch) / name), steps=WARM + BATCHES)
            joined(config)
            run = Run(config, accelerated(config))
            sides.append((run.reader.train(), run.batches(), Objective(direct_ret=config.direct_ret)))
        spent = [0.0, 0.0]
        for number in tqdm(range(WARM + BATCHES), desc="batches", file=sys.stderr):
            for side, (reader, batches, objective) in enumerate(sides):
                begun = time.process_time()
                batch = batches[number]
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16_on("cpu", reader.model.width).fast):
                    step(reader, batch, objective, cache=False)
                reader.zero_grad(set_to_none=True)
                if number >= WARM:
                    spent[side] += time.process_time() - begun
    print(f"CPU time of {BATCHES} batches: ours {spent[0]:.1f} s, no reasoning {spent[1]:.1f} s, ratio {spent[0] / spent[1]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
