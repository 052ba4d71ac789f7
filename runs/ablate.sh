#!/usr/bin/env bash
# The paper's ablations in miniature: every variant on MiniBEIR with three seeds, then a page, a plot and a sentence for each claim.
#
#     runs/ablate.sh                   all tables
#     runs/ablate.sh table4,table5     some of them
#
# JOBS processes work side by side; started twice, on one machine, it shares the work. After a kill the same command goes on.
# The lessons that all variants start from are trained first where they are missing.
set -euo pipefail
cd "$(dirname "$0")/.."
traceir="${TRACEIR:-traceir} --threads 1"
test -f data/minibeir/meta.json || $traceir minibeir build --scale full --seed 0 --out data/minibeir

$traceir ablate "${1:-all}" --out out/ablate --seeds 0,1,2 --jobs "${JOBS:-1}" --report docs/results/ablations
