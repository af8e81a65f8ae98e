#!/usr/bin/env bash
# Runs a command on all workers of a TPU slice, and again after preemptions.
# Makes the slice unless one of that name exists; deletes what it made, at the
# end, after errors and after Ctrl-C. A slice that was there stays.
# Usage: bash launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v5litepod-256
#          [--project=P] [--version=RUNTIME] [--spot] [--keep] [--restarts=10]
#          [--dry-run] -- python -m lookup_vit.train --config=... --workdir=gs://...
# --keep leaves the slice. --dry-run prints the commands for a slice that is not
# there yet. POLL=30 are the seconds between two looks at a slice.
# Restarts, after preemptions and crashes alike, are at most --restarts.
# Ends with 0: done; 75: preempted too often, the same command continues; 1 and
# 2: an error that a restart would not mend; others: crashed too often.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
source launch/tpu_slice.sh

name="" zone="" type="" project="" version="" spot="" keep="" restarts=10
poll="${POLL:-30}"
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --spot) spot=--spot ;;
    --keep) keep=1 ;;
    --dry-run) dry_run=1 ;;
    *) die "unknown argument $1; the command goes after --" ;;
  esac
  shift
done
[ $# -eq 0 ] || shift

check_input() {
  local flag changes
  for flag in name zone type; do
    [ -n "${!flag}" ] || die "want --$flag=..."
  done
  [[ "$name" =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] || die "--name=$name:" \
    "want at most 63 of a-z, 0-9 and -, from a letter to a letter or digit"
  want_count --restarts "$restarts"
  want_command "$@"
  if [ -z "$version" ]; then
    case "$type" in
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v6e-*) version=v2-alpha-tpuv6e ;;
      v[234]-*) version=tpu-ubuntu2204-base ;;
      *) die "no runtime known for --type=$type: want --version=RUNTIME" ;;
    esac
  fi
  [ -n "$dry_run" ] ||
    want_program gcloud "install https://cloud.google.com/sdk"
  changes="$(git status --porcelain)" || die "want a git repository in $PWD"
  [ -z "$changes" ] ||
    echo "warning: uncommitted changes are not sent, only HEAD is" >&2
}

# In a session of its own: Ctrl-C reaches this script alone, which cleans up.
call() {
  local status=0
  if [ -n "$dry_run" ]; then
    quoted "$@"
    return
  fi
  setsid "$@" < /dev/null &
  child=$!
  wait "$child" || status=$?
  child=""
  return "$status"
}

tpu() {
  call gcloud compute tpus tpu-vm "$@" "${where[@]}"
}

# Keepalives end a connection to a machine that is gone.
on_workers() {
  tpu ssh "$name" --worker=all --ssh-flag=-oConnectTimeout=20 \
    --ssh-flag=-oServerAliveInterval=30 --command="$1"
}

# Only what git does not know, workdirs and the environment, stays from before.
install() {
  local into="mkdir -p lookup_vit && find lookup_vit -mindepth 1 -maxdepth 1"
  into+=" ! -name .venv ! -name workdirs -exec rm -rf {} +"
  into+=" && tar -xzf lookup_vit.tar.gz -C lookup_vit"
  say "installing on all workers"
  tpu scp "$archive" "$name:lookup_vit.tar.gz" --worker=all || return
  on_workers "$into && bash lookup_vit/launch/tpu_worker.sh install" || return
}

run() {
  local status=0
  say "running; worker 0 follows, each worker's log is ~/lookup_vit_run/log"
  running=1
  on_workers "$(quoted bash lookup_vit/launch/tpu_worker.sh run "$@")" ||
    status=$?
  running=""
  return "$status"
}

cleanup() {
  local status=$?
  trap '' INT TERM HUP PIPE # A second Ctrl-C must not leave a slice behind.
  set +e
  if [ -n "$child" ]; then kill -- "-$child" && wait "$child"; fi 2> /dev/null
  if [ -z "$dry_run" ]; then
    # The terminal, or `| tee`, may be gone; gcloud would fail to write there.
    say "ending with status $status" || exec 2>> "build/launch/$name.log"
    exec >&2
  fi
  if [ -n "$running" ]; then
    say "stopping the run; it saves first"
    on_workers "bash lookup_vit/launch/tpu_worker.sh stop"
  fi
  if [ -n "$made" ] && [ -z "$keep" ]; then delete; fi
  exit "$status"
}

# Ends the script, or returns where another attempt makes sense.
judge() {
  local status="$1"
  [ "$status" -ne 0 ] || exit 0
  look 10 || exit "$status"
  if [ "$state" != READY ]; then
    say "the slice was preempted: it is ${state:-gone}"
    status=75
  else
    say "it ended with status $status"
    case "$status" in
      64) exit 1 ;; # See launch/tpu_worker.sh.
      2 | 126 | 127) exit "$status" ;;
    esac
  fi
  [ "$attempt" -le "$restarts" ] || exit "$status"
}

main() {
  local _ attempt=1 status tries=1
  call mkdir -p build/launch
  call git archive --format=tar.gz --output="$archive" HEAD
  while true; do
    status=0
    have_slice "$tries" || status=$?
    if [ "$status" -ne 0 ]; then
      # Capacity that was taken away may need a while to come back.
      [ "$status" -ne 2 ] || exit "$([ "$attempt" -gt 1 ] && echo 75 || echo 2)"
      [ "$attempt" -gt 1 ] || exit 1
      [ "$attempt" -le "$restarts" ] || exit 75
      for _ in {1..9}; do sleep "$poll"; done
    else
      { install && run "$launch-$attempt" "$@"; } || status=$?
      judge "$status"
    fi
    say "restart $attempt of $restarts"
    sleep "$poll"
    attempt=$((attempt + 1)) tries=10
  done
}

check_input "$@"
launch="lookup-vit-$(date -u +%Y%m%d-%H%M%S)-$$"
archive="build/launch/$name.tar.gz"
where=(--zone="$zone" ${project:+"--project=$project"} --quiet)
child="" running=""
[ -z "$dry_run" ] || quoted cd "$PWD"
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
trap 'exit 141' PIPE
main "$@"
