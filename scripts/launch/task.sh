#!/usr/bin/env bash
# One process of a SLURM job, under srun: SLURM's numbers by the names that torch and accelerate read. See slurm.sbatch.
set -euo pipefail
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
export LOCAL_WORLD_SIZE="${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
machines="$((WORLD_SIZE / LOCAL_WORLD_SIZE))" share="$LOCAL_WORLD_SIZE"
source "$(dirname "${BASH_SOURCE[0]}")/sharding.sh"
exec "${PYTHON:-python}" -m diffalign "$@"
