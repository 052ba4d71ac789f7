#!/usr/bin/env bash
# The paper's training at its scale, one preset of train/presets.py from data to scores:
#
#     runs/paper.sh qwen2.5-vl-7b      the paper's model (the default)
#     runs/paper.sh qwen2-vl-2b        its smallest backbone
#     runs/paper.sh qwen2.5-vl-3b      in between; not in the paper
#
# NPROC GPUs of this machine take part; they must divide the batch of 1,024. SETTINGS go to the training: where a GPU cannot hold
# the base, SETTINGS="--set shard=true" divides it among them. To train on several nodes, start torchrun on each of them first
# (docs/training.md), then this script on one of them for the rest: a finished training is left alone.
# Every command resumes where it was cut off. No full run of it has been made by us yet.
set -euo pipefail
cd "$(dirname "$0")/.."
preset="${1:-qwen2.5-vl-7b}"
nproc="${NPROC:-8}"
traceir="${TRACEIR:-traceir}"

# What must be there: M-BEIR itself, and its train split with reasoning labels as M-BEIR-CoT (docs/formats.md, section 17).
# The labels are not published; making them with a teacher is a job of its own and not part of this script.
mbeir="${MBEIR:-data/mbeir}"
cot="${COT:-data/mbeir-cot}"
for folder in "$mbeir/cand_pool" "$cot"; do
    test -d "$folder" || { echo "$folder is missing; docs/training.md, Data, says what belongs there" >&2; exit 1; }
done

run="out/runs/$preset" model="out/models/$preset" scores="out/scores/$preset"

# One stage, one epoch: language-model loss and InfoNCE together, LoRA and projector.
"${TORCHRUN:-torchrun}" --standalone --nproc-per-node "$nproc" -m traceir train --preset "$preset" --data "$cot" --out "$run" \
    ${SETTINGS:-}

# Adapter and base as one plain checkpoint.
test -f "$model/traceir.json" || $traceir merge "$run/checkpoint" --out "$model" --dtype bfloat16

# All 16 rows: every GPU encodes its share, then one process finds everything encoded and scores.
evaluate="$traceir evaluate --data $mbeir --model $model --route auto,direct --pool both --out $scores --device cuda --dtype bfloat16"
$evaluate --dry-run
shares=()
for ((i = 0; i < nproc; i++)); do
    CUDA_VISIBLE_DEVICES=$i $evaluate --shard "$i/$nproc" &
    shares+=($!)
done
for share in "${shares[@]}"; do wait "$share"; done
$evaluate --shard 0/1

# Beside the published figures, and what reasoning won and lost.
$traceir report scoreboard "ours=$scores" "ours, direct=$scores:direct" --out "out/report/$preset/scoreboard.md"
$traceir compare "auto=$scores:auto" "direct=$scores:direct" --out "out/report/$preset/compare.md"
