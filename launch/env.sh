# shellcheck shell=bash
# Sourced by the other scripts: makes the environment if it is not there, and
# puts it on PATH. VENV chooses its place, PYTHON the interpreter.
# Usage: source launch/env.sh EXTRAS   (EXTRAS may be empty: "")

make_env() {
  local extras="$1" python="${PYTHON:-python3}" stamp other wanted
  VENV="${VENV:-$PWD/.venv}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: want Python 3.11 or newer; set PYTHON=..." >&2
    return 1
  fi
  # What is installed: another lock file, or an extra more, installs again.
  stamp="$VENV/installed-$extras"
  wanted="$(cat setup.py requirements.lock | cksum)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing into $VENV (about two minutes) ..."
    if ! "$python" -m venv "$VENV"; then
      echo "error: python3 -m venv failed; on Debian: apt-get install python3-venv" >&2
      return 1
    fi
    for other in "$VENV"/installed-*; do
      [ "$(cat "$other" 2>/dev/null)" = "$wanted" ] || rm -f "$other"
    done
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint requirements.lock --editable ".${extras:+[$extras]}" ||
      return 1
    echo "$wanted" > "$stamp"
  fi
  export PATH="$VENV/bin:$PATH"
}

make_env "$1"
