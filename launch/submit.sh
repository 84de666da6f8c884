#!/usr/bin/env bash
# Check a run, or every point of a scaling study, and queue it.
#
# Usage: launch/submit.sh --cluster NAME|FILE --recipe NAME|FILE --run FOLDER [options] [-- MEGATRON ARGUMENTS]
#
#   --cluster NAME|FILE   the cluster: launch/clusters/NAME.env, or a file of KEY=VALUE lines
#   --recipe NAME|FILE    the model: launch/recipes/NAME.args, or a file of Megatron's arguments
#   --run FOLDER          checkpoints, logs, tensorboard; on a file system that all nodes share
#   --nodes N, --time T   instead of the cluster file's
#   --study "CP=1:2 SEQ=32768:98304 ATTENTION=dense:lighthouse"
#                         an array of short runs, one for each combination: see launch/scaling.sbatch
#   --profile nsys|torch|dlprof, --profile-steps FIRST-LAST (11-12), --profile-ranks "RANKS" (0)
#                         traces in RUN/profile
#   --as evaluation       load the last checkpoint, dense, and leave its validation loss in RUN/evaluation.json
#   --sbatch "FLAGS"      more flags of sbatch, such as "--dependency=afterok:7 --exclude=node3"
#   --check 0             check nothing here, layout and data neither (a login node without torch or nsys)
#   --only-check 1        check, ask sbatch --test-only, and queue nothing
#
# Prints the job's number. Data is among Megatron's arguments: --data-path, --text-data or --mock-data.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/study.sh
source "$LAUNCH/study.sh"

STUDY='' SBATCH='' CHECK=1 ONLY_CHECK=0
OWN="--study=STUDY --sbatch=SBATCH --check=CHECK --only-check=ONLY_CHECK" parse_options "${BASH_SOURCE[0]}" "$@"
for pair in --check=CHECK --only-check=ONLY_CHECK; do
    [[ $(declare -n value=${pair#*=} && echo "$value") =~ ^[01]$ ]] || die "${pair%%=*} must be 0 or 1: see --help."
done
script=pretrain
if [[ -n $STUDY ]]; then
    script=scaling AS=point
    study_points "$STUDY"
fi
run_arguments

# the run, or each point, on the layout that Slurm is asked for
check_here() {
    local PYTHON=$PYTHON sees # a container's is not here
    [[ -z $IMAGE || ! -x $ROOT/.venv/bin/python ]] || PYTHON=$ROOT/.venv/bin/python
    PYTHON=${CHECK_PYTHON:-$PYTHON} sees=$(container_folders)
    "$PYTHON" -c 'import importlib.util as found, sys; sys.exit(not found.find_spec("torch"))' 2>/dev/null ||
        die "The check needs a Python with torch, and $PYTHON is none here. Nothing was queued: put torch (a build for CPUs will do)" \
            "into $ROOT/.venv, name another Python by CHECK_PYTHON, or give --check 0, and layout and data are not checked."
    if [[ -n $STUDY ]]; then
        check_study "$NODES" "$GPUS_PER_NODE" --sees "$sees"
    else
        "$PYTHON" -m megatron_lighthouse.launch.check --arch "$ARCH" --device "$(device)" \
            --nodes "$NODES" --gpus-per-node "$GPUS_PER_NODE" --sees "$sees" -- "${ARGUMENTS[@]}"
    fi
}

jobs=$RUN/logs/$AS.jobs # the numbers of those that were queued
# two jobs would write one checkpoint: the last that Slurm knows must have ended, or be waited for
check_alone() {
    local last
    [[ -z $STUDY ]] || return 0
    last=$(job_under_way "$AS")
    [[ -z $last || "$SBATCH " =~ (singleton|after[a-z]+(:[0-9]+)*:$last)[^0-9] ]] ||
        die "--run $RUN: its job $last ($AS) is queued or runs. Nothing was queued: scancel $last, wait for its end, or add" \
            "--sbatch \"--dependency=afterok:$last\"."
}

# without either, Slurm gives a task one core
check_cores() {
    [[ $ARCH == cpu || $EXCLUSIVE == 1 || -n $CPUS_PER_TASK || $SBATCH =~ (--(exclusive|cpus-per-)|-c\ ) ]] ||
        die "EXCLUSIVE=0 and no CPUS_PER_TASK in $CLUSTER is one core for each GPU: set EXCLUSIVE=1, or CPUS_PER_TASK to a node's" \
            "cores / GPUS_PER_NODE=$GPUS_PER_NODE, such as 8."
}

[[ $AS != train ]] || check_time
check_cores
check_alone
if ((CHECK)); then
    [[ -n $IMAGE ]] || find_profiler env
    check_here >&2 || die "Nothing was queued."
fi

flags=(--job-name="$(basename "$RUN")" --nodes="$NODES" --ntasks-per-node="$GPUS_PER_NODE" --time="$TIME"
    --output="$RUN/logs/%j.log" --requeue --open-mode=append)
[[ $AS != train ]] || flags+=(--signal="URG@$SIGNAL_SECONDS") # the others have nothing to save
[[ -z $PARTITION ]] || flags+=(--partition="$PARTITION")
[[ -z $ACCOUNT ]] || flags+=(--account="$ACCOUNT")
[[ -z $QOS ]] || flags+=(--qos="$QOS")
[[ -z $SEGMENT ]] || flags+=(--segment="$SEGMENT")
[[ -z $CPUS_PER_TASK ]] || flags+=(--cpus-per-task="$CPUS_PER_TASK")
((EXCLUSIVE == 0)) || flags+=(--exclusive --mem=0)
[[ $ARCH == cpu ]] || flags+=(--gpus-per-node="$GPUS_PER_NODE")
[[ -z $STUDY ]] || flags+=(--array="0-$((${#POINTS[@]} - 1))")
read -ra more <<<"$SBATCH"
flags+=("${more[@]}")

export LIGHTHOUSE_LAUNCH=$LAUNCH
job=("$LAUNCH/$script.sbatch" --cluster "$CLUSTER" --recipe "$RECIPE" --run "$RUN" --nodes "$NODES" --as "$AS")
[[ -z $STUDY ]] || job+=(--study "$STUDY")
[[ -z $PROFILE ]] || job+=(--profile "$PROFILE" --profile-steps "$PROFILE_STEPS" --profile-ranks "$PROFILE_RANKS")
job+=(-- "${MEGATRON[@]}")
sbatch --test-only "${flags[@]}" "${job[@]}" >&2 || die "Nothing was queued: Slurm refuses the flags above."
((ONLY_CHECK == 0)) || exit 0
mkdir -p "$RUN/logs"
number=$(sbatch --parsable "${flags[@]}" "${job[@]}")
[[ -n $STUDY ]] || echo "${number%%;*}" >>"$jobs" # a federation adds the cluster's name
echo "$number"
