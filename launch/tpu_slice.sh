# shellcheck shell=bash disable=SC2034,SC2154  # Shared with tpu_pod.sh.
# Sourced by tpu_pod.sh: makes, watches and deletes the TPU slice `name`. What
# it made has `launch`, the name of this launch, as a label.

state="" owner="" # What look saw last.
made="" creating="" # create was called; it is being waited for.
dry_slice="" # What look would see, were this no dry run.

say() {
  [ -n "$dry_run" ] || echo "tpu_pod: $*" >&2
}

# Sets `state` (empty: there is no such slice) and `owner` (who made it).
look() {
  local tries="$1" line list=(gcloud compute tpus tpu-vm list "${where[@]}"
    --filter="name~/$name\$" --format="value(state,labels.launch)")
  if [ -n "$dry_run" ]; then
    quoted "${list[@]}"
    read -r state owner <<< "$dry_slice"
    return
  fi
  until line="$("${list[@]}" < /dev/null)"; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || return 1
    sleep "$poll"
  done
  read -r state owner <<< "$line" || true
}

create() {
  local status=0
  say "creating $type $name in $zone; it costs money until it is deleted"
  made=1 creating=1
  tpu create "$name" --accelerator-type="$type" --version="$version" \
    ${spot:+"$spot"} --labels=launch="$launch" || status=$?
  creating="" dry_slice="READY $launch"
  return "$status"
}

# The label tells: not even a slice of this name that somebody else made in
# the same minute is deleted. One whose creation was cut short may show late.
delete() {
  local try
  for try in {1..10}; do
    if look 1; then
      if [ -n "$state" ]; then
        [ "$owner" = "$launch" ] && [ "$state" != DELETING ] || return 0
        say "deleting $name"
        if tpu delete "$name"; then return; fi
      elif [ -z "$creating" ] || [ "$try" -gt 3 ]; then
        return 0
      fi
    fi
    sleep "$poll"
  done
  echo "error: $name may still be there, and cost money. To delete it:" >&2
  dry_run=1 tpu delete "$name" >&2
  return 1
}

# A slice that is READY, or status 1; 2 where it is not for this script to mend.
have_slice() {
  local _ tries="$1"
  look "$tries" || return 1
  if [[ "$state" == @(PREEMPTED|TERMINATED) && "$owner" == "$launch" ]]; then
    delete || return 1
    state=""
  fi
  if [ -z "$state" ]; then
    create || return 1
    look 10 || return 1
  fi
  for _ in {1..60}; do
    case "$state" in
      READY) return ;;
      CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | "") ;;
      *)
        [ "$owner" != "$launch" ] || return 1
        say "error: slice $name is $state, and not made by this launch:" \
          "delete it, or choose another --name"
        return 2
        ;;
    esac
    sleep "$poll"
    look 10 || return 1
  done
  say "error: slice $name is still $state"
  return 1
}
