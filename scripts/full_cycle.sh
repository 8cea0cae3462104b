#!/usr/bin/env bash
# From the embedded model to a verdict, with no hand edits: build 512 ranked groups, filter, look, train, evaluate, report.
#   bash scripts/full_cycle.sh honest      the reward reads prompt and picture: the held-out judge says better, no alarm
#   bash scripts/full_cycle.sh hackable    the reward is brightness: the alarm fires
# Run it again to go on where it stopped. The result: runs/full_cycle-KIND/report.html and report.json (verdict, alarm).
kind=${1:-}
case "$kind" in
    honest|hackable) ;;
    *) echo "usage: bash scripts/full_cycle.sh honest|hackable" >&2; exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
.venv/bin/diffalign build "configs/build/$kind.yaml"
.venv/bin/diffalign check "configs/full_cycle/$kind.yaml"
.venv/bin/diffalign train "configs/full_cycle/$kind.yaml"
.venv/bin/diffalign evaluate "configs/full_cycle/$kind.yaml"
