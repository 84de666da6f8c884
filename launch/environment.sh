# shellcheck shell=bash
# Sourced by common.sh: environment variables of the ranks, from this shell, the cluster file and by architecture, and of a container.

# those that a cluster file may set, beside its own keys; they go to the ranks as they are
ENVIRONMENT_KEYS="CUDA_DEVICE_MAX_CONNECTIONS NVTE_FWD_LAYERNORM_SM_MARGIN NVTE_BWD_LAYERNORM_SM_MARGIN NCCL_NVLS_ENABLE"
ENVIRONMENT_KEYS+=" PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF NCCL_IB_HCA NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_DEBUG"
ENVIRONMENT_KEYS+=" OMP_NUM_THREADS TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR"
ENVIRONMENT_PREFIXES="NCCL_ GLOO_ UCX_ FI_ NVTE_ HF_ TORCH_ NVSHMEM_"
ALLOCATOR=expandable_segments:True # unless the user has set either name of the variable

is_ranks_variable() { [[ " $ENVIRONMENT_KEYS " == *" $1 "* || " $ENVIRONMENT_PREFIXES " == *" ${1%%_*}_ "* ]]; }

# before a cluster file: what this shell exports, in SHELL_VARIABLES, wins over the file's, which FABRIC names
read_environment() {
    local name
    SHELL_VARIABLES=() FABRIC=()
    for name in $(compgen -e); do
        ! is_ranks_variable "$name" || SHELL_VARIABLES+=("$name")
    done
    [[ -n ${PYTORCH_CUDA_ALLOC_CONF:-} ]] || unset PYTORCH_CUDA_ALLOC_CONF # an empty one would count
    [[ ${PYTORCH_ALLOC_CONF:-} != "${PYTORCH_CUDA_ALLOC_CONF:-}" && -n ${PYTORCH_ALLOC_CONF:-} ]] || unset PYTORCH_ALLOC_CONF
    [[ -z ${PYTORCH_ALLOC_CONF:-} || -z ${PYTORCH_CUDA_ALLOC_CONF:-} ]] ||
        die "PYTORCH_ALLOC_CONF=$PYTORCH_ALLOC_CONF and PYTORCH_CUDA_ALLOC_CONF=$PYTORCH_CUDA_ALLOC_CONF in the environment are one setting" \
            "by its new and its old name, and torch would take the old alone: unset one of them."
}

# variable $1 of a cluster file, with its value
ranks_variable() {
    local other=''
    case $1 in
        PYTORCH_ALLOC_CONF) other=PYTORCH_CUDA_ALLOC_CONF ;;
        PYTORCH_CUDA_ALLOC_CONF) other=PYTORCH_ALLOC_CONF ;;
    esac
    [[ -z $other || " ${FABRIC[*]} " != *" $other "* ]] ||
        die "$CLUSTER: PYTORCH_ALLOC_CONF and PYTORCH_CUDA_ALLOC_CONF are the new and the old name of one setting: leave one of them out."
    FABRIC+=("$1")
    [[ -n ${!1+set} || -n ${other:+${!other:-}} ]] || export "$1=$2"
}

# the default is not mixed into what the user has set
say_allocator() {
    local name
    for name in PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF; do
        [[ -z ${!name:-} || ${!name} == *expandable_segments:* ]] ||
            echo "launch: $name=${!name} is taken as it is, without the default $ALLOCATOR" >&2
    done
}

# to start ranks on this machine alone: take out what another launcher, such as Kubernetes' PyTorchJob, has set for its own.
# torchrun would take PET_NNODES for its --nnodes, and the variables of `srun --pty` would make every rank the first
forget_launcher() {
    local name found=("${!PET_@}")
    ((${#found[@]} == 0)) ||
        echo "launch: all ranks run on this machine, so torchrun is not given the ${found[*]} of the environment" >&2
    for name in "${found[@]}" SLURM_PROCID SLURM_LOCALID SLURM_NTASKS; do unset "$name"; done
}

# by architecture; what the environment or the cluster file has set stays
architecture_environment() {
    export PYTHONUNBUFFERED=1 LIGHTHOUSE_ARCH=$ARCH LIGHTHOUSE_NUMA=$NUMA
    if [[ $ARCH == cpu ]]; then
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
        return
    fi
    if [[ $ARCH == blackwell ]]; then
        export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-32}
    elif (($(argument --tensor-model-parallel-size 1) > 1 || $(argument --context-parallel-size 1) > 1)); then
        export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    fi
    export NVTE_FWD_LAYERNORM_SM_MARGIN=${NVTE_FWD_LAYERNORM_SM_MARGIN:-16}
    export NVTE_BWD_LAYERNORM_SM_MARGIN=${NVTE_BWD_LAYERNORM_SM_MARGIN:-16}
    export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
    # not both: torch would take the old name alone
    [[ -n ${PYTORCH_ALLOC_CONF:-} ]] || export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-$ALLOCATOR}
}

# srun's flags for a container in CONTAINER; none where the cluster file names no image
# shellcheck disable=SC2034 # used by the scripts
container_flags() {
    CONTAINER=()
    [[ -n $IMAGE ]] || return 0
    CONTAINER=(--container-image="$IMAGE" --no-container-mount-home
        --container-mounts="$ROOT:$ROOT,$RUN:$RUN${MOUNTS:+,$MOUNTS}"
        --container-env="$(words "$ENVIRONMENT_KEYS" "${FABRIC[@]}" PYTHONPATH PYTHONUNBUFFERED | tr ' ' ,)")
}

# the folders that such a container sees, apart by colons, as FOLDER or FOLDER=HERE where it has another name here; none without an image
container_folders() {
    local mounts mount from to
    [[ -n $IMAGE ]] || return 0
    IFS=, read -ra mounts <<<"$MOUNTS"
    printf %s "$ROOT:$RUN"
    for mount in "${mounts[@]}"; do
        IFS=: read -r from to _ <<<"$mount"
        printf %s ":${to:-$from}"
        [[ ${to:-$from} == "$from" ]] || printf %s "=$from"
    done
}
