#!/usr/bin/env bash
# A run, or a scaling study, on this machine, by torchrun and without Slurm.
#
# Usage: launch/local.sh --cluster NAME|FILE --recipe NAME|FILE --run FOLDER [options] [-- MEGATRON ARGUMENTS]
#
#   --gpus N       processes, instead of the cluster file's GPUS_PER_NODE; of a study, how many a point may take
#   --study "CP=1:2 SEQ=32768:98304 ATTENTION=dense:lighthouse"
#                  every combination one after another, each on just the GPUs of one sequence, in RUN/ATTENTION-SEQ-cpCP.
#                  Nothing starts unless all can; one that fails does not stop the others; those done are skipped next time
#   --profile nsys|torch|dlprof, --profile-steps FIRST-LAST (11-12), --profile-ranks "RANKS" (0)
#                  traces in RUN/profile
#   --only-check 1 check it as launch/submit.sh does, and start nothing
#   --as evaluation
#                  load the last checkpoint, dense, and leave its validation loss in RUN/evaluation.json
#
# CUDA_VISIBLE_DEVICES says which GPUs: two studies can share a machine. The log is RUN/logs/local.log and the terminal.
# --nodes above 1 and --time are for Slurm. SIGTERM or Ctrl-C saves and ends a run, and ends a study; the same command
# goes on from there. A second signal, 5 s later or more, ends it within 30 s.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/study.sh
source "$LAUNCH/study.sh"
# shellcheck source=launch/check.sh
source "$LAUNCH/check.sh"
# shellcheck source=launch/wait.sh
source "$LAUNCH/wait.sh"

GPUS='' STUDY='' CHECK=quick ONLY_CHECK=0
OWN="--gpus=GPUS --study=STUDY --only-check=ONLY_CHECK" parse_options "${BASH_SOURCE[0]}" "$@"
check_check
if [[ -n $IMAGE ]]; then
    echo "IMAGE=$IMAGE in $CLUSTER is for jobs: nothing here runs in a container." >&2
    [[ $PYTHON != python3 || ! -x $ROOT/.venv/bin/python ]] || PYTHON=$ROOT/.venv/bin/python
fi
[[ $ONLY_CHECK == 0 ]] || CHECK=1 # else the run asks Megatron itself, in seconds

# GPUs that a process here sees; nothing where that cannot be told
gpus_here() {
    local seen
    [[ -n $ARCH && $ARCH != cpu ]] || return 0
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        IFS=, read -ra seen <<<"$CUDA_VISIBLE_DEVICES"
        echo "${#seen[@]}"
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L | grep -c '^GPU' || true
    elif ! compgen -G "/dev/nvidia[0-9]*" >/dev/null && [[ ! -e /dev/dxg ]]; then # WSL's
        echo 0
    fi
}

# torchrun would give its ranks 30 s: they are asked themselves, unless it is asked again (`timeout` signals twice at once)
save() { { ((SECONDS < STOPPED + 5)) && pkill -URG -P "$1"; } || end "$1"; }

# ARGUMENTS on $1 processes, logged to $2
train_here() {
    local out tee status=0
    mkdir -p "$RUN/logs"
    make_profile_folder
    exec {out}> >(trap '' TERM INT HUP && exec tee -a "$2") # it outlives a signal to the group
    tee=$!
    listen save TERM INT HUP
    set -m # a process group of its own: Ctrl-C reaches this script alone
    "$PYTHON" -m torch.distributed.run --standalone --nnodes 1 --nproc-per-node "$1" --no-python bash "$LAUNCH/task.sh" \
        "$PYTHON" -m "$MODULE" "${ARGUMENTS[@]}" </dev/null >&"$out" 2>&1 {out}>&- &
    set +m
    exec {out}>&-
    wait_for $! || status=$?
    wait "$tee" || true # the end of the log
    return "$status"
}

# with & each point has its own folder, arguments and environment
run_point() {
    enter_point "$1"
    if point_is_done; then
        echo "study: $NAME is done already"
        exit 0
    fi
    gpus=$(gpus_of_sequence)
    describe_point "$gpus"
    architecture_environment
    echo "study: $NAME on $gpus GPUs"
    train_here "$gpus" "$RUN/logs/local.log" || exit 1
    finished || exit 1
    say_how_to_report
}

run_study() {
    local found failed=()
    for found in "${POINTS[@]}"; do
        point "$found"
        listen end TERM INT HUP
        run_point "$found" &
        wait_for $! || { failed+=("$NAME") && echo "study: $NAME failed: $RUN/$NAME/logs/local.log" >&2; }
        [[ -z $STOPPED ]] || { echo "study: stopped" >&2 && exit 143; }
    done
    trap - TERM INT HUP
    "$PYTHON" -m megatron_lighthouse.plan scaling "$RUN" --out "$RUN" || failed+=("the table")
    ((${#failed[@]} == 0)) || die "study: failed: ${failed[*]}"
}

((${OVER_NODES:-1} == 1)) || wrong "--nodes $OVER_NODES: local.sh runs on this machine alone: use --gpus, or launch/submit.sh for Slurm."
[[ -z $OVER_TIME ]] || wrong "--time $OVER_TIME: local.sh has no time limit: leave it out, or use launch/submit.sh for Slurm."
here=$(gpus_here)
[[ $here != 0 ]] || {
    wrong "ARCH=$ARCH in $CLUSTER needs a GPU, and this process sees none (CUDA_VISIBLE_DEVICES='${CUDA_VISIBLE_DEVICES-unset}'):" \
        "name GPUs, as in CUDA_VISIBLE_DEVICES=0,1, or use --cluster cpu-test."
    here=''
}
if [[ -n $STUDY ]]; then
    AS=point
    study_points "$STUDY" || STUDY='' # then the rest is checked without it
    GPUS=${GPUS:-${here:-$GPUS_PER_NODE}}
else
    GPUS=${GPUS:-$GPUS_PER_NODE}
fi
[[ -z $GPUS || $GPUS =~ ^[1-9][0-9]*$ ]] || {
    wrong "--gpus $GPUS must be a whole number of at least 1."
    GPUS=''
}
[[ -z $here ]] || ((GPUS <= here)) || wrong "$GPUS GPUs are asked for, and this machine shows $here: use --gpus $here, or fewer."
find_profiler env
forget_launcher
if [[ -n $STUDY ]]; then
    run_arguments
    CHECK=1 NODES=${GPUS:+1} GPUS_PER_NODE=$GPUS check_arguments --exact --runs-here now || exit 2
    die_if_wrong # which the check has said
    ((ONLY_CHECK == 0)) || exit 0
    run_study
    exit
fi

[[ $AS != evaluation ]] || (($(iteration))) || wrong "--as evaluation: $RUN/checkpoints holds no whole checkpoint."
run_arguments
architecture_environment
NODES=${GPUS:+1} GPUS_PER_NODE=$GPUS check_arguments --runs-here now || exit 2
die_if_wrong
((ONLY_CHECK == 0)) || exit 0
log=$RUN/logs/$([[ $AS == evaluation ]] && echo evaluation || echo local).log
[[ $AS != evaluation ]] || rm -f "$log" # the loss of an earlier one is not this one's
train_here "$GPUS" "$log"
if [[ $AS == evaluation ]]; then
    write_evaluation "$log" || die "There is no validation loss in $log: has the data a validation part, and is --eval-iters above 0?"
    cat "$RUN/evaluation.json"
fi
say_how_to_report
