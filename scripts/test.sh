#!/usr/bin/env bash
# The tests, in the same environment: a process a core, each with one thread. Extra arguments go to pytest: bash scripts/test.sh -m slow
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
.venv/bin/ruff check .
.venv/bin/lint-imports --no-cache
.venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
