#!/usr/bin/env bash
# The batch script that launch/slurm.sh submits; runs in the repository.
# Usage: sbatch ... launch/slurm_job.sh GPUS_PER_NODE COMMAND...
set -euo pipefail
gpus="$1"
shift
source launch/env.sh cuda
# Under SLURM, JAX takes one GPU a task unless it is told.
JAX_LOCAL_DEVICE_IDS="$(seq -s , 0 "$((gpus - 1))")"
export JAX_LOCAL_DEVICE_IDS

trap : TERM # The tasks get it too; this waits for their status.
status=0
# A task that has saved must not end those that are about to. Without binding,
# the input pipeline has all cores.
srun --kill-on-bad-exit=0 --cpu-bind=none "$@" || status=$?
# 143: told to stop before it could save anything.
if [ "$status" -eq 75 ] || [ "$status" -eq 143 ]; then
  echo "Preempted; back into the queue: job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$status"
