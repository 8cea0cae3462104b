#!/usr/bin/env bash
# diffalign on all GPUs of one machine, or of several, by torch's own launcher:
#   bash scripts/launch/torchrun.sh train CONFIG [key=value ...]
# Several machines: the same command on each, with NODES=4 HEAD=address-of-the-first; output_dir and data.cache_dir on a disk
# that all share. PROCESSES: processes a machine (its GPUs). SHARDING=fsdp2, zero2 or hsdp cuts the weights
# (configs/accelerate/).
# On CPUs: PROCESSES=2 bash scripts/launch/torchrun.sh train CONFIG train.cpu=true.
# torchrun ends with 1 whenever a process ends with another code than 0, also for a run that was stopped and can be resumed.
set -euo pipefail
PROCESSES="${PROCESSES:-$(nvidia-smi -L 2>/dev/null | wc -l || true)}"
if [ "$PROCESSES" -lt 1 ]; then
    echo "no GPU found; set PROCESSES, and train.cpu=true for a run on CPUs" >&2
    exit 2
fi
machines="${NODES:-1}" share="$PROCESSES"
source "$(dirname "${BASH_SOURCE[0]}")/sharding.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "${NODES:-1}" -gt 1 ]; then
    where=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_id "${RUN_ID:-diffalign}"
           --rdzv_endpoint "${HEAD:?set HEAD to the address of the first machine}:${PORT:-29500}")
else
    where=(--standalone)
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${where[@]}" --nproc_per_node "$PROCESSES" -m diffalign "$@"
