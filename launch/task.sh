#!/usr/bin/env bash
# One rank: its number from Slurm (torchrun has set it already), node-local caches, NUMA binding, then the command.
#
# Usage: srun … launch/task.sh COMMAND…

set -euo pipefail
[[ ! ${1:-} =~ ^(-h|--help)$ ]] || { sed -n '/^# Usage/s/^# //p' "${BASH_SOURCE[0]}" && exit 0; }

# shellcheck source=launch/wait.sh
source "$(dirname "${BASH_SOURCE[0]}")/wait.sh"

# Slurm signals every process of a step. URG kills none that does not catch it, as TERM would the checkpoint's writer
trap 'exit 143' URG TERM INT # nothing runs yet
export RANK=${SLURM_PROCID:-$RANK} LOCAL_RANK=${SLURM_LOCALID:-$LOCAL_RANK} WORLD_SIZE=${SLURM_NTASKS:-$WORLD_SIZE}
# on a shared file system all ranks would compile into one folder; under Slurm TMPDIR is the login shell's
[[ -n ${SLURM_PROCID:-} ]] && caches=${SLURM_TMPDIR:-/tmp} || caches=${TMPDIR:-/tmp}
caches+=/megatron_lighthouse-$(id -u)
mkdir -p "$caches" 2>/dev/null || caches=/tmp/megatron_lighthouse-$(id -u)
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$caches/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$caches/inductor}
mkdir -p "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR"

say() { ((RANK > 0)) || echo "launch: $*"; }

# the NUMA node of this rank's GPU in NUMA, or why there is none in REASON
find_numa() {
    local devices device bus
    NUMA='' REASON='NUMA=0 in the cluster file'
    ((${LIGHTHOUSE_NUMA:-1})) || return 0
    REASON='no numactl'
    command -v numactl >/dev/null || return 0
    REASON='no nvidia-smi'
    command -v nvidia-smi >/dev/null || return 0
    IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-}"
    device=${devices[LOCAL_RANK]:-$LOCAL_RANK}
    bus=$(nvidia-smi --query-gpu=pci.bus_id --format=csv,noheader -i "$device" 2>/dev/null | tr '[:upper:]' '[:lower:]') || bus=''
    bus=/sys/bus/pci/devices/${bus#0000}/numa_node # nvidia-smi writes eight digits of domain, the kernel four
    REASON="no node in $bus"
    [[ -r $bus ]] || return 0
    NUMA=$(<"$bus")
    ((NUMA >= 0)) || NUMA=''
}

bind=()
if [[ ${LIGHTHOUSE_ARCH:-} != cpu ]]; then
    find_numa
    if [[ -n $NUMA ]] && ! numactl --cpunodebind="$NUMA" --membind="$NUMA" true 2>/dev/null; then
        # no core of that node in the job, or a container forbids it. It may befall some ranks only: those of the first node say so
        ((RANK != LOCAL_RANK)) || echo "launch: rank $RANK: no NUMA binding: numactl may not bind to node $NUMA"
    elif [[ -n $NUMA ]]; then
        bind=(numactl --cpunodebind="$NUMA" --membind="$NUMA")
        say "NUMA node $NUMA"
    else
        say "no NUMA binding: $REASON"
    fi
fi

wrap=()
if [[ " ${LIGHTHOUSE_PROFILER_RANKS:-0} " == *" $RANK "* ]]; then
    trace=${LIGHTHOUSE_PROFILER_FOLDER:-}/${SLURM_JOB_ID:-local}_$(hostname)_$RANK
    case ${LIGHTHOUSE_PROFILER:-} in
        nsys)
            wrap=(nsys profile --capture-range=cudaProfilerApi --capture-range-end=stop --trace="cuda,nvtx,cublas,cudnn"
                --force-overwrite=true --output="$trace")
            ;;
        dlprof) wrap=(dlprof --mode=pytorch --force=true --output_path="$trace") ;; # Nsight Systems inside
    esac
fi

if ((RANK == 0)); then
    echo "launch: the environment of $WORLD_SIZE ranks:"
    env | grep -E '^(CUDA_|NVTE_|NCCL_|GLOO_|UCX_|FI_|NVSHMEM_|TORCH_|PYTORCH_|TRITON_|TORCHINDUCTOR_|OMP_NUM|MASTER_|WORLD_SIZE)' | sort | sed 's/^/launch:   /'
fi

# Not exec: what a killed rank leaves behind (data loaders, the checkpoint's writer) holds its output open, and Slurm would wait
# for that before it says that the rank is dead.
listen end URG TERM INT
set -m # the command gets a process group
"${bind[@]}" "${wrap[@]}" "$@" </dev/null &
child=$! status=0
# torchrun kills this script where it does not end in time, and a rank that lives on would hold its GPU
(while kill -0 $$; do sleep 2; done && sleep 5 && kill -KILL -- "-$child") </dev/null >/dev/null 2>&1 &
watcher=$!
disown "$watcher" # else bash may report that it is killed below
set +m            # else `wait` answers at once, and with that, while the command is suspended
wait_for "$child" || status=$?
kill -KILL -- "-$child" "-$watcher" 2>/dev/null || true
((status != 16)) || echo "launch: rank $RANK ended with status 16: what is not finite would be so again" # pretrain.sbatch looks for both
((status != 2)) || echo "launch: rank $RANK ended with status 2: its command line is refused" 
exit "$status"
