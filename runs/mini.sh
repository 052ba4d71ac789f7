#!/usr/bin/env bash
# The bundled model from nothing, on one core, and with `runs/mini.sh mini-direct` its baseline: the same start, pairs and lessons,
# but no pair reasons. Every command resumes where it was cut off; a finished stage is left alone.
# What else was tried is in LOG.md (2026-11-22 and 23).
set -euo pipefail
cd "$(dirname "$0")/.."
traceir="${TRACEIR:-traceir} --threads 1"
test -f data/minibeir/meta.json || $traceir minibeir build --scale full --seed 0 --out data/minibeir

# What a pretrained Qwen2.5-VL would bring along; shared by both arms, no retrieval in it.
$traceir train --preset mini-naming   # say what a picture shows
$traceir train --preset mini-words    # follow edits and recite facts, in words
$traceir train --preset mini-lessons  # all of it together, edits from pictures too

# The one stage of the paper: language-model loss and InfoNCE together.
$traceir train --preset "${1:-mini}"
