#!/usr/bin/env bash
# Sets everything up and passes the linter and the tests.
# Usage: bash launch/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh test
ruff check .
ruff format --check .
shellcheck launch/*.sh .ci/run
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
