#!/usr/bin/env bash
# Submits a command to SLURM, on whole nodes, one task each; after a crash it
# starts again; the job goes back into the queue when it is preempted or near its
# time limit, and continues.
# Usage: bash launch/slurm.sh [--nodes=1] [--gpus-per-node=8] [--time=24:00:00]
#          [--partition=P] [--restarts=3] [--dry-run] \
#          -- python -m lookup_vit.train --config=... --workdir=...
# Further options of sbatch: by its variables, e.g. SBATCH_ACCOUNT=A.
# The repository and --workdir must be on a file system that all nodes share.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

nodes=1 gpus=8 limit=24:00:00 partition="" restarts=3
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --nodes=*) nodes="${1#*=}" ;;
    --gpus-per-node=*) gpus="${1#*=}" ;;
    --time=*) limit="${1#*=}" ;;
    --partition=*) partition="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --dry-run) dry_run=1 ;;
    *) die "unknown argument $1; the command goes after --" ;;
  esac
  shift
done
[ $# -eq 0 ] || shift
for flag in "--nodes $nodes" "--gpus-per-node $gpus"; do
  want_count "${flag%% *}" "${flag#* }"
  [ "${flag#* }" -gt 0 ] || die "want ${flag%% *} of at least 1"
done
want_count --restarts "$restarts"
want_command "$@"
if [ -n "$dry_run" ]; then
  quoted cd "$PWD"
else
  want_program sbatch "run this where jobs are submitted"
fi

# Here, since the nodes may have no network.
call source launch/env.sh cuda
call mkdir -p workdirs
# SIGTERM reaches the processes two minutes before the limit, and they save.
call sbatch --job-name=lookup_vit --nodes="$nodes" --ntasks-per-node=1 \
  --gpus-per-node="$gpus" --exclusive --mem=0 --time="$limit" \
  ${partition:+"--partition=$partition"} --signal=TERM@120 --requeue \
  --open-mode=append --output=workdirs/slurm-%j.log \
  launch/slurm_job.sh "$gpus" "$restarts" "$@"
