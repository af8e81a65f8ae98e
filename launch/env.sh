# shellcheck shell=bash
# Sourced by the other scripts: makes the environment if it is not there, and
# puts it on PATH. VENV chooses its place, PYTHON the interpreter.
# Usage: source launch/env.sh [EXTRAS]

make_env() {
  local extras="${1:-}" python="${PYTHON:-python3}" stamp
  VENV="${VENV:-$PWD/.venv}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: want Python 3.11 or newer; set PYTHON=..." >&2
    return 1
  fi
  # A stamp for what is installed: a new lock file or extra installs again.
  stamp="$VENV/installed-$(cat setup.py requirements.lock | cksum | cut -d' ' -f1)$extras"
  if [ ! -e "$stamp" ]; then
    echo "Installing into $VENV (about two minutes) ..."
    if ! "$python" -m venv "$VENV"; then
      echo "error: python3 -m venv failed; on Debian: apt-get install python3-venv" >&2
      return 1
    fi
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint requirements.lock --editable ".${extras:+[$extras]}"
    touch "$stamp"
  fi
  export PATH="$VENV/bin:$PATH"
}

make_env "$@"
