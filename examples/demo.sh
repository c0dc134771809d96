#!/usr/bin/env bash
# The main job, end to end: plan a real model for a real cluster, then really train a small one under two planned
# strategies on processes of this machine, with the losses of one device and the prediction beside the measurement.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

echo "== 1. Plan Llama-3-70B on 64 H100, and explain the winner =="
say meshwright plan llama-3-70b dgx-h100x8 --global-batch 256 --seq-len 8192 --top 5 --out "$out/70b.json"
say meshwright explain llama-3-70b dgx-h100x8 "$out/70b.json" --global-batch 256 --seq-len 8192

echo
echo "== 2. Measure this machine, and plan a small Llama for 4 of its processes =="
say meshwright calibrate local --nproc 4 --out "$out/this-machine.json"
batch=(--global-batch 8 --seq-len 64 --precision float32)
say meshwright plan llama-20m "$out/this-machine.json" "${batch[@]}" --top 3 --out "$out/best.json"
say meshwright plan llama-20m "$out/this-machine.json" "${batch[@]}" --top 1 --fix tp=2,pp=2 --out "$out/other.json"

echo
echo "== 3. Train under both, against one device, predicted beside measured =="
for plan in best other; do
    say meshwright run "$out/$plan.json" --steps 3 --check --cluster "$out/this-machine.json"
done
