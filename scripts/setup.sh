# Sourced by the other scripts: a virtual environment in .venv with the versions of constraints.txt. Does nothing when up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
wanted=$(cat constraints.txt pyproject.toml | sha256sum | cut -c1-16)
if [ "$(cat .venv/.diffalign-setup 2>/dev/null || true)" != "$wanted" ]; then
    if [ ! -x .venv/bin/python ]; then
        python=$(command -v python3.11 || command -v python3)
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "diffalign needs Python 3.10 or newer" >&2; exit 2; }
        "$python" -m venv .venv
    fi
    echo "setting up .venv (once, some minutes)"
    # torch first and by exact version: an index may offer a build for this machine under that version
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$(sed -n 's/^torch==//p' constraints.txt)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
    echo "$wanted" > .venv/.diffalign-setup
fi
export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
