#!/usr/bin/env bash
# The bundled model from nothing, on one core; `runs/mini.sh mini-direct` makes the baseline, which sees the same pairs and lessons but
# never reasons about a pair. Every command resumes where it was cut off; a finished stage is left alone.
# What each stage is for, and what was tried instead, is in LOG.md (2026-11-22).
set -euo pipefail
cd "$(dirname "$0")/.."
traceir="${TRACEIR:-traceir} --threads 1"
arm="${1:-mini}"
run=out/runs/$arm
test -f data/minibeir/meta.json || $traceir minibeir build --scale full --seed 0 --out data/minibeir

# 1. The joint objective from random weights: retrieval and routing are learnt, what it writes is still noise.
$traceir train --preset $arm --out $run-1 --set steps=2000 --set warmup=200 --set decay=0

# 2. Lessons: say what a picture shows.
$traceir train --preset mini-lessons --init $run-1/checkpoint --out $run-2 --set steps=250 \
  --set weights.lessons_facts=0 --set weights.lessons_steps=0

# 3. The same, with a few facts and chains.
$traceir train --preset mini-lessons --init $run-2/checkpoint --out $run-3 --set steps=400 --set seed=1 \
  --set weights.lessons_facts=0.15 --set weights.lessons_steps=0.15

# 4. All three kinds of lesson within each step.
$traceir train --preset mini-lessons --init $run-3/checkpoint --out $run-4 --set steps=200 --set seed=2 \
  --set batch=16 --set accumulate=4 \
  --set weights.lessons_naming=0.25 --set weights.lessons_facts=0.25 --set weights.lessons_steps=0.5

# 5. The joint objective again.
$traceir train --preset $arm --init $run-4/checkpoint --out $run
