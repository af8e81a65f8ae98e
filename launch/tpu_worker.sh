#!/usr/bin/env bash
# One worker's side of launch/tpu_pod.sh, which calls it through ssh. Ends with
# the command's status, but with 64 in place of 1: 1 is gcloud's own failure.
# The command runs apart from the ssh connection: where that breaks, gcloud
# connects again with the same RUN, and only follows what is still going on.
# Usage: bash launch/tpu_worker.sh install
#        bash launch/tpu_worker.sh run RUN COMMAND...   (RUN: LAUNCH-ATTEMPT)
#        bash launch/tpu_worker.sh stop
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
record="$HOME/lookup_vit_run" # Holds: run, pid, status, log.
mkdir -p "$record"
touch "$record/log"

# The system's Python may be older than 3.11, or unable to make environments.
find_python() {
  local check='import ensurepip, sys; sys.exit(sys.version_info < (3, 11))'
  if python3 -c "$check" 2> /dev/null; then
    echo python3
    return
  fi
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv >&2
  python3 -m uv python install --quiet 3.11 >&2
  python3 -m uv python find --system 3.11
}

number="" # Of this worker.
is_first() {
  local key=instance/attributes/agent-worker-number
  [ -n "$number" ] || number="$(curl -sf --max-time 10 \
    -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/$key")" || number=0
  [ "$number" = 0 ]
}

to_run() {
  kill "$1" -- "-$(cat "$record/pid")" 2> /dev/null
}

is_alive() {
  [ -f "$record/pid" ] && [ ! -f "$record/status" ] && to_run -0
}

# SIGTERM makes training save; what does not leave in time is killed.
stop() {
  local _
  if is_alive; then to_run -TERM || true; fi
  for _ in {1..600}; do
    is_alive || break
    sleep 0.1
  done
  [ ! -f "$record/pid" ] || to_run -KILL || true
}

start() {
  local run="$1" old
  shift
  old="$(cat "$record/run" 2> /dev/null || true)"
  if is_alive && [ "${old%-*}" != "${run%-*}" ]; then
    if is_first; then
      echo "error: this slice runs $old, of another launch; to end it:" \
        "bash lookup_vit/launch/tpu_worker.sh stop, on all workers" >&2
    fi
    exit 2
  fi
  stop # What an earlier attempt left would hold the chips.
  rm -f "$record/status"
  echo "== $run" >> "$record/log"
  PATH="$PWD/.venv/bin:$PATH" setsid bash launch/tpu_worker.sh hold "$@" \
    >> "$record/log" 2>&1 < /dev/null &
  echo "$!" > "$record/pid"
  echo "$run" > "$record/run"
}

# Lasts as long as the command does, and ends with its status.
follow() {
  local lines="$1" pid file="$record/log"
  pid="$(cat "$record/pid")"
  is_first || file=/dev/null
  tail --lines="$lines" --follow --sleep-interval=0.2 --pid="$pid" "$file"
  status="$(cat "$record/status" 2> /dev/null || echo 137)"
  # Worker 0 knows the step; those that were not lost first, JAX ends by SIGABRT.
  case "$status" in
    0 | 1 | 2 | 75 | 126 | 127) ;;
    *) say_lost "worker $number, on $HOSTNAME," "$status" "$record/log" ;;
  esac
  [ "$status" -ne 1 ] || status=64
  exit "$status"
}

case "$1" in
  install)
    PYTHON="$(find_python)"
    export PYTHON
    source launch/env.sh tpu > "$record/install.log" || exit 64
    ;;
  run)
    shift
    if [ "$(cat "$record/run" 2> /dev/null)" = "$1" ]; then
      follow 0
    else
      begin="$(wc -l < "$record/log")"
      start "$@"
      follow "+$((begin + 2))"
    fi
    ;;
  hold)
    shift
    trap : TERM # The command gets it too; this waits for its status.
    status=0
    "$@" || status=$?
    echo "$status" > "$record/status"
    ;;
  stop) stop ;;
  *)
    echo "error: want install, run or stop, got $1" >&2
    exit 2
    ;;
esac
