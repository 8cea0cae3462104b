#!/usr/bin/env bash
# The main job on the embedded model: align with Diffusion-DPO, then compare with the base. Nothing is downloaded but packages.
# Extra arguments are overrides: bash scripts/quickstart.sh seed=1 output_dir=runs/seed1
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
.venv/bin/diffalign train configs/quickstart.yaml "$@"
.venv/bin/diffalign evaluate configs/quickstart.yaml "$@"
