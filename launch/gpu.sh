#!/usr/bin/env bash
# Runs a command on the GPUs of this machine, and again after a crash.
# Usage: bash launch/gpu.sh [--restarts=3] [--dry-run] \
#          -- python -m lookup_vit.train --config=... --workdir=...
# Ends with the status of the command: 0: done; 1: an error that a restart would
# not mend; others: it crashed more often than --restarts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

restarts=3
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --restarts=*) restarts="${1#*=}" ;;
    --dry-run) dry_run=1 ;;
    *) die "unknown argument $1; the command goes after --" ;;
  esac
  shift
done
[ $# -eq 0 ] || shift
want_count --restarts "$restarts"
want_command "$@"

if [ -n "$dry_run" ]; then
  quoted cd "$PWD"
else
  want_program nvidia-smi "it comes with NVIDIA's driver"
  gpus="$(nvidia-smi --list-gpus)" || gpus=""
  [[ "$gpus" == *GPU* ]] || die "nvidia-smi finds no GPU on this machine"
fi
call source launch/env.sh cuda
run=(python -m lookup_vit.supervise --restarts="$restarts" -- "$@")
if [ -n "$dry_run" ]; then quoted "${run[@]}"; else exec "${run[@]}"; fi
