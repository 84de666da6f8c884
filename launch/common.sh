# shellcheck shell=bash
# Sourced by every launch script: options, the cluster profile, the recipe, and what they mean for srun and the environment.

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$LAUNCH")
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

# keys of a profile: what the scripts need, and variables that go to the ranks as they are
PROFILE_KEYS="NODES GPUS_PER_NODE ARCH PARTITION ACCOUNT QOS TIME SIGNAL_SECONDS MAX_REQUEUES SEGMENT EXCLUSIVE CPUS_PER_TASK
    IMAGE MOUNTS PYTHON PREFLIGHT"
ENVIRONMENT_KEYS="CUDA_DEVICE_MAX_CONNECTIONS NVTE_FWD_LAYERNORM_SM_MARGIN NVTE_BWD_LAYERNORM_SM_MARGIN NCCL_NVLS_ENABLE
    PYTORCH_CUDA_ALLOC_CONF NCCL_IB_HCA NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_DEBUG OMP_NUM_THREADS TRITON_CACHE_DIR
    TORCHINDUCTOR_CACHE_DIR"

die() {
    printf '%s\n' "$*" >&2
    exit 2
}

# what a script's first comment says
usage() { sed -n '/^# Usage/,/^$/s/^# \{0,1\}//p' "$1"; }

words() { printf '%s\n' "$@" | xargs; }

# options that all scripts share; what follows -- goes to Megatron. A script's own are in OWN: "--flag=VARIABLE …"
parse_options() {
    local script=$1 pair
    shift
    PROFILE='' RECIPE='' RUN='' OVER_NODES='' OVER_TIME='' MEGATRON=()
    while (($#)); do
        case $1 in
            -h | --help) usage "$script" && exit 0 ;;
            --)
                shift
                MEGATRON=("$@")
                break
                ;;
        esac
        for pair in --profile=PROFILE --recipe=RECIPE --run=RUN --nodes=OVER_NODES --time=OVER_TIME ${OWN:-}; do
            [[ $1 == "${pair%%=*}" ]] || continue
            (($# > 1)) || die "$1 needs a value."
            declare -g "${pair#*=}=$2"
            shift 2
            continue 2
        done
        die "$1 is not an option of $(basename "$script"): see --help. Megatron's arguments come after a --."
    done
    for pair in --profile=PROFILE --recipe=RECIPE --run=RUN; do
        [[ -n $(declare -n value=${pair#*=} && echo "$value") ]] || die "${pair%%=*} is missing: see --help."
    done
    [[ -e $PROFILE || $PROFILE == */* ]] || PROFILE=$LAUNCH/profiles/$PROFILE.env
    [[ -e $RECIPE || $RECIPE == */* ]] || RECIPE=$LAUNCH/recipes/$RECIPE.args
    read_profile "$PROFILE"
    NODES=${OVER_NODES:-$NODES} TIME=${OVER_TIME:-$TIME}
    check_profile
    read_recipe "$RECIPE"
    mkdir -p "$RUN/logs"
    RUN=$(cd "$RUN" && pwd)
    PROFILE=$(realpath "$PROFILE") RECIPE=$(realpath "$RECIPE")
}

read_profile() {
    local file=$1 line key value number=0
    [[ -r $file ]] || die "--profile $file cannot be read: give a file, or one of $(words "$LAUNCH"/profiles/*.env)."
    for key in $PROFILE_KEYS; do declare -g "$key="; done
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        line=${line%%[[:space:]]#*}
        line=${line%"${line##*[![:space:]]}"}
        [[ -z $line || $line == \#* ]] && continue
        [[ $line =~ ^([A-Za-z_0-9]+)=(.*)$ ]] || die "$file, line $number: '$line' is not KEY=VALUE."
        key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
        if [[ " $(words "$PROFILE_KEYS") " == *" $key "* ]]; then
            declare -g "$key=$value"
        elif [[ " $(words "$ENVIRONMENT_KEYS") " == *" $key "* ]]; then
            [[ -n ${!key+set} ]] || export "$key=$value" # the environment wins
        else
            die "$file, line $number: $key is not a key of a profile: use one of $(words "$PROFILE_KEYS" "$ENVIRONMENT_KEYS")."
        fi
    done <"$file"
}

check_profile() {
    local key
    : "${TIME:=4:00:00}" "${SIGNAL_SECONDS:=600}" "${MAX_REQUEUES:=10}" "${EXCLUSIVE:=0}" "${PREFLIGHT:=1}"
    for key in NODES GPUS_PER_NODE SIGNAL_SECONDS MAX_REQUEUES; do
        [[ ${!key} =~ ^[0-9]+$ ]] || die "$key='${!key}' in $PROFILE must be a whole number."
    done
    ((NODES > 0 && GPUS_PER_NODE > 0)) || die "NODES=$NODES and GPUS_PER_NODE=$GPUS_PER_NODE in $PROFILE must be at least 1."
    for key in EXCLUSIVE PREFLIGHT; do
        [[ ${!key} =~ ^[01]$ ]] || die "$key='${!key}' in $PROFILE must be 0 or 1."
    done
    [[ $ARCH =~ ^(blackwell|hopper|cpu)$ ]] || die "ARCH='$ARCH' in $PROFILE is not known: use blackwell, hopper or cpu."
    [[ -z $SEGMENT ]] || { [[ $SEGMENT =~ ^[0-9]+$ ]] && ((SEGMENT >= 1 && SEGMENT <= 18)); } ||
        die "SEGMENT='$SEGMENT' in $PROFILE must be 1 to 18: an NVLink domain has 18 trays."
    [[ -z $MOUNTS || -n $IMAGE ]] || die "MOUNTS=$MOUNTS in $PROFILE is for a container: set IMAGE too, or leave it out."
    if [[ -z $PYTHON ]]; then
        PYTHON=python3
        [[ -n $IMAGE || ! -x $ROOT/.venv/bin/python ]] || PYTHON=$ROOT/.venv/bin/python
    fi
}

# a recipe: Megatron's arguments, words apart by blanks, # begins a comment
read_recipe() {
    local file=$1 line found=()
    [[ -r $file ]] || die "--recipe $file cannot be read: give a file, or one of $(words "$LAUNCH"/recipes/*.args)."
    RECIPE_ARGUMENTS=()
    while IFS= read -r line || [[ -n $line ]]; do
        read -ra found <<<"${line%%#*}" || true
        RECIPE_ARGUMENTS+=("${found[@]}")
    done <"$file"
}

# the run's whole command line in ARGUMENTS: the recipe, the folders of --run, then what stood after --
run_arguments() {
    local word
    for word in "${RECIPE_ARGUMENTS[@]}" "${MEGATRON[@]}"; do
        case $word in
            --save | --load | --save=* | --load=*)
                die "$word is set by --run, so that a requeued job finds its checkpoint: leave it out (--pretrained-checkpoint starts from another)."
                ;;
        esac
    done
    ARGUMENTS=("${RECIPE_ARGUMENTS[@]}" --save "$RUN/checkpoints" --load "$RUN/checkpoints"
        --tensorboard-dir "$RUN/tensorboard" --data-cache-path "$RUN/data" --exit-signal-handler "${MEGATRON[@]}")
}

# the value of flag $1 in ARGUMENTS, the last one counting, as for Megatron; else $2
argument() {
    local i value=$2
    for ((i = 0; i < ${#ARGUMENTS[@]}; i++)); do
        case ${ARGUMENTS[i]} in
            "$1") value=${ARGUMENTS[i + 1]:-} ;;
            "$1"=*) value=${ARGUMENTS[i]#*=} ;;
        esac
    done
    printf '%s\n' "$value"
}

# the iteration of the last whole checkpoint
iteration() { cat "$RUN/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }

# whether the run is where --train-iters or --exit-interval ends it
finished() {
    local reached every
    reached=$(iteration) every=$(argument --exit-interval 0)
    ((reached > 0)) && ((reached >= $(argument --train-iters 0) || (every > 0 && reached % every == 0)))
}

# by architecture; what the environment or the profile has set stays
architecture_environment() {
    export PYTHONUNBUFFERED=1 LIGHTHOUSE_ARCH=$ARCH
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
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
}

# srun's flags for a container in CONTAINER; none where the profile names no image
# shellcheck disable=SC2034 # used by the scripts
container_flags() {
    CONTAINER=()
    [[ -n $IMAGE ]] || return 0
    CONTAINER=(--container-image="$IMAGE" --no-container-mount-home
        --container-mounts="$ROOT:$ROOT,$RUN:$RUN${MOUNTS:+,$MOUNTS}"
        --container-env="$(words "$ENVIRONMENT_KEYS" PYTHONPATH PYTHONUNBUFFERED | tr ' ' ,)")
}
