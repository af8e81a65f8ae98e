#!/usr/bin/env bash
# The batch script that launch/slurm.sh submits; runs in the repository.
# Usage: sbatch ... launch/slurm_job.sh GPUS_PER_NODE RESTARTS COMMAND...
set -euo pipefail
gpus="$1" restarts="$2"
shift 2
source launch/common.sh
source launch/env.sh cuda
# Under SLURM, JAX takes one GPU a task unless it is told.
JAX_LOCAL_DEVICE_IDS="$(seq -s , 0 "$((gpus - 1))")"
export JAX_LOCAL_DEVICE_IDS
log="workdirs/slurm-$SLURM_JOB_ID.log"

trap : TERM # The tasks get it too; this waits for their status.
for ((attempt = 1; ; attempt++)); do
  status=0
  echo "== Start $attempt of job $SLURM_JOB_ID"
  # A task that has saved must not end those that are about to. Without binding,
  # the input pipeline has all cores.
  srun --kill-on-bad-exit=0 --cpu-bind=none "$@" || status=$?
  case "$status" in
    75 | 143) # 143: told to stop before it could save anything.
      echo "Preempted; back into the queue: job $SLURM_JOB_ID"
      scontrol requeue "$SLURM_JOB_ID" && exit 0
      exit "$status"
      ;;
    0 | 1 | 2 | 126 | 127) exit "$status" ;;
  esac
  # srun has said how each task ended, and on which node.
  say_lost "The run" "$status" "$log"
  [ "$attempt" -le "$restarts" ] || exit "$status"
  echo "Restart $attempt of $restarts"
done
