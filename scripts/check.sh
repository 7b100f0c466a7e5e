#!/usr/bin/env bash
# Run the checks of CI, in an environment with `pip install -e '.[dev]'`: scripts/check.sh [--fast | --lint]
#
#   (nothing)   ruff's linter and formatter, mypy, and the tests that `pytest` runs by default
#   --fast      the same with the quick tests only (77 s on two cores), for the edit loop
#   --lint      without tests
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
    "") tests=(pytest) ;;
    --fast) tests=(pytest -m "not slow and not long") ;;
    --lint) tests=() ;;
    *)
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0" >&2
        exit 2
        ;;
esac

ruff check .
ruff format --check .
mypy
if ((${#tests[@]})); then "${tests[@]}"; fi
