# SHARDING=none, fsdp2, zero2 or hsdp -> the variables that accelerate reads; the same as configs/accelerate/fsdp2.yaml, zero2.yaml
# and hsdp.yaml. Reads machines and share, the processes of each.
case "${SHARDING:-none}" in
    none) ;;
    fsdp2 | hsdp) export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_RESHARD_AFTER_FORWARD=true ;;
    zero2) export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_RESHARD_AFTER_FORWARD=false ;;
    *) echo "SHARDING=$SHARDING: choose none, fsdp2, zero2 or hsdp" >&2; exit 2 ;;
esac
if [ "${SHARDING:-none}" = hsdp ]; then
    export ACCELERATE_USE_PARALLELISM_CONFIG=true
    export PARALLELISM_CONFIG_DP_REPLICATE_SIZE="$machines" PARALLELISM_CONFIG_DP_SHARD_SIZE="$share"
fi
