# SHARDING=none, fsdp2 or zero2 -> the variables that accelerate reads; the same as configs/accelerate/fsdp2.yaml and zero2.yaml
case "${SHARDING:-none}" in
    none) ;;
    fsdp2) export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_RESHARD_AFTER_FORWARD=true ;;
    zero2) export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_RESHARD_AFTER_FORWARD=false ;;
    *) echo "SHARDING=$SHARDING: choose none, fsdp2 or zero2" >&2; exit 2 ;;
esac
