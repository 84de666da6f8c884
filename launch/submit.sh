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
#   --check quick         do not ask Megatron, which takes seconds: flags, layout, sizes and data alone
#   --check 0             check nothing here, layout and data neither (a login node without torch or nsys)
#   --only-check 1        check, ask sbatch --test-only, and queue nothing
#
# Prints the job's number. Data is among Megatron's arguments: --data-path, --text-data or --mock-data.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/study.sh
source "$LAUNCH/study.sh"
# shellcheck source=launch/check.sh
source "$LAUNCH/check.sh"

STUDY='' SBATCH='' CHECK=1 ONLY_CHECK=0
OWN="--study=STUDY --sbatch=SBATCH --check=CHECK --only-check=ONLY_CHECK" parse_options "${BASH_SOURCE[0]}" "$@"
check_check
script=pretrain
if [[ -n $STUDY ]]; then
    script=scaling AS=point
    study_points "$STUDY" || STUDY='' # then the rest is checked without it
fi
run_arguments

# what the numbers of the queued jobs are kept by: two would write one checkpoint, or one point's log
names=("$AS")
if [[ -n $STUDY ]]; then
    names=()
    for found in "${POINTS[@]}"; do point "$found" && names+=("$NAME"); done
fi
# the last that Slurm knows must have ended, or be waited for
check_alone() {
    local last flag=" $SBATCH "
    [[ -n $STUDY || ! $flag =~ \ (--array[=\ ]|-a\ ?)([^\ ]*) || ${BASH_REMATCH[2]} == *%1 ]] ||
        wrong "--sbatch \"$SBATCH\": the array's jobs would train into one --run side by side: let one run at a time, as --array=0-3%1 does."
    last=$(job_under_way "${names[@]}")
    [[ -z $last || $flag =~ (singleton|after[a-z]+(:[0-9_]+)*:($last|${last%_*}))[^0-9_] ]] ||
        wrong "--run $RUN: its job $last ($AS) is queued or runs. Nothing was queued: scancel $last, wait for its end, or add" \
            "--sbatch \"--dependency=afterok:${last%_*}\"."
}

# with --export=NONE, many sites' default, what this shell exports does not reach the job, and cannot win over the cluster file
say_what_stays() {
    local flag=" $SBATCH " exports=${SBATCH_EXPORT:-ALL} name stays=()
    while [[ $flag =~ \ --export[=\ ]([^\ ]*)(.*) ]]; do exports=${BASH_REMATCH[1]} flag=${BASH_REMATCH[2]}; done
    for name in "${SHELL_VARIABLES[@]}"; do
        [[ ",$exports," =~ ,(ALL|$name)[,=] ]] || stays+=("$name")
    done
    ((${#stays[@]} == 0)) ||
        echo "launch: --export=$exports keeps this shell's ${stays[*]} from the job: set them in the cluster file, or give" \
            "--sbatch \"--export=ALL\"" >&2
}

# without either, Slurm gives a task one core
check_cores() {
    [[ -z $ARCH || $ARCH == cpu || $EXCLUSIVE == 1 || -n $CPUS_PER_TASK || $SBATCH =~ (--(exclusive|cpus-per-)|-c\ ) ]] ||
        wrong "EXCLUSIVE=0 and no CPUS_PER_TASK in $CLUSTER is one core for each GPU: set EXCLUSIVE=1, or CPUS_PER_TASK to a node's" \
            "cores / GPUS_PER_NODE${GPUS_PER_NODE:+=$GPUS_PER_NODE}, such as 8."
}

[[ $AS != train ]] || check_time
check_cores
check_alone
[[ $ONLY_CHECK != 0 ]] || say_what_stays
if [[ $CHECK != 0 ]]; then
    [[ -n $IMAGE ]] || find_profiler env
    # shellcheck disable=SC2119 # the script's own are not its
    check_here >&2 || nothing_queued
fi
die_if_wrong # which the check has said, unless it is none of ours

flags=(--job-name="$(basename "$RUN")" --nodes="$NODES" --ntasks-per-node="$GPUS_PER_NODE" --time="$TIME"
    --output="$RUN/logs/$([[ -n $STUDY ]] && echo %A_%a || echo %j).log" --requeue --open-mode=append)
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

# inside an allocation: sbatch would pass its SLURM_RESTART_COUNT, SLURM_ARRAY_TASK_ID and the like on to a job that has none
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    for name in "${!SLURM_@}"; do [[ $name =~ ^SLURM_(CONF|CLUSTERS) ]] || unset "$name"; done
fi
# the job does not rely on this shell's environment: see say_what_stays. The image's Python is not here
[[ -n $IMAGE ]] || PYTHON=$(command -v "$PYTHON" || echo "$PYTHON")
job=("$LAUNCH/$script.sbatch" --launch "$LAUNCH" --python "$PYTHON" --cluster "$CLUSTER" --recipe "$RECIPE" --run "$RUN" --nodes "$NODES" --as "$AS")
[[ -z $STUDY ]] || job+=(--study "$STUDY")
[[ -z $PROFILE ]] || job+=(--profile "$PROFILE" --profile-steps "$PROFILE_STEPS" --profile-ranks "$PROFILE_RANKS")
job+=(-- "${MEGATRON[@]}")
ask_slurm "${flags[@]}" "${job[@]}"
if [[ $ONLY_CHECK != 0 ]]; then
    say_only_checked
    exit
fi
mkdir -p "$RUN/logs"
number=$(sbatch --parsable "${flags[@]}" "${job[@]}")
number=${number%%;*} # a federation adds the cluster's name
for i in "${!names[@]}"; do
    echo "$number${STUDY:+_$i}" >>"$RUN/logs/${names[i]}.jobs"
done
echo "$number"
