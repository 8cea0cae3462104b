#!/usr/bin/env bash
# The tests, in the same environment. Extra arguments go to pytest: bash scripts/test.sh -m slow
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
.venv/bin/ruff check .
.venv/bin/lint-imports --no-cache
.venv/bin/python -m pytest "$@"
