#!/usr/bin/env bash
# Trains a set of runs of configs/ablation.py over seeds, and makes a table of
# all runs in WORKDIR. Continues where it was stopped; runs that have come to
# their end, or have diverged, are not repeated.
# Usage: bash launch/ablations.sh [SET] [WORKDIR] [CONFIG ARGUMENTS]
#   such as: SEEDS="0 1" bash launch/ablations.sh reuse workdirs/mine epochs=30
# SET: grid, reuse, heads, init, mlp, mhbc; variations, which are all of these;
# or stability.
set -euo pipefail
name="${1:-variations}"
out="$(realpath -m "${2:-workdirs/ablations}")"
arguments="${3:+,$3}"
read -r -a seeds <<< "${SEEDS:-0 1 2}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

# The config's arguments for each run of a set, a line each.
runs_of() {
  local part
  case "$1" in
    grid) printf 'name=%s\n' default grid_{2x2,3x3,5x5} ;;
    reuse) printf 'name=%s\n' default reuse_{logits,none,scale_tokens} ;;
    heads) printf 'name=%s\n' default heads_{compressed,lookup} ;;
    init) printf 'name=%s\n' default init_{average,learned} ;;
    mlp) printf 'name=%s\n' default mlp_ratio_2 lookup_mlp_ratio_{0.25,1} ;;
    mhbc) printf 'name=%s\n' default mhbc_heads_{1,4} ;;
    variations)
      for part in grid reuse heads init mlp mhbc; do runs_of "$part"; done
      ;;
    stability)
      printf '%s\n' \
        size={small,large},qk_norm={false,true},clip={0,1},lr={0.001,0.003,0.01,0.03,0.1}
      ;;
    *) die "SET $1: want grid, reuse, heads, init, mlp, mhbc, variations or" \
      "stability" ;;
  esac
}

diverged() {
  grep -qs '"train/diverged"' "$1/metrics.jsonl"
}

runs="$(runs_of "$name" | awk '!seen[$0]++')"
source launch/env.sh ""
for run in $runs; do
  for seed in "${seeds[@]}"; do
    folder="${run#name=}"
    folder="${folder//,/_}"
    workdir="$out/${folder//=/-}_$seed"
    if [ -f "$workdir/results.json" ] || diverged "$workdir"; then continue; fi
    status=0
    python -m lookup_vit.train --workdir="$workdir" \
      --config="configs/ablation.py:$run,seed=$seed$arguments" || status=$?
    if [ "$status" -ne 0 ] && ! diverged "$workdir"; then exit "$status"; fi
  done
done

shopt -s nullglob
workdirs=("$out"/*/config.json)
IFS=,
python -m lookup_vit.analysis.ablations --output="$out/ablations.md" \
  --workdirs="${workdirs[*]%/config.json}"
