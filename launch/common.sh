# shellcheck shell=bash
# Sourced by the scripts that launch runs elsewhere: errors, and commands that
# --dry-run prints instead of running.

dry_run="${dry_run:-}"

die() {
  echo "error: $*" >&2
  exit 2
}

# A command in one line that a shell reads back as the same arguments.
quoted() {
  local arg line=""
  for arg in "$@"; do
    case "$arg" in
      "" | *[!A-Za-z0-9_./:=,@%+-]*) arg="${arg@Q}" ;;
    esac
    line+="${line:+ }$arg"
  done
  printf '%s\n' "$line"
}

call() {
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

# Says that a part of a run was lost, how, and after which step, which it reads
# off the log, from its last line "== ..." on.
say_lost() {
  local who="$1" status="$2" log="$3" step name how="with status $2"
  if [ "$status" -gt 128 ] && name="$(kill -l "$((status - 128))" 2>&1)"; then
    how="by SIG$name"
  fi
  step="$(awk '/^== / { step = "" }
    match($0, / step [0-9]+\/[0-9]+/) { step = substr($0, RSTART, RLENGTH) }
    END { print step }' "$log")" || step=""
  echo "$who was lost${step:+ after$step}: it ended $how" >&2
}

want_count() {
  case "$2" in
    "" | *[!0-9]*) die "want $1=NUMBER, got $1=$2" ;;
  esac
}

want_command() {
  [ $# -gt 0 ] || die "want a command after --, e.g." \
    "-- python -m lookup_vit.train --config=CONFIG --workdir=WORKDIR"
}

want_program() {
  command -v "$1" > /dev/null || die "no $1 on this machine: $2"
}
