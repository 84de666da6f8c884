#!/usr/bin/env bash
# Stage 1 with Lighthouse, stage 2 dense (or --lighthouse-around), then an evaluation: three jobs, each of which waits for the one before to be done,
# requeues included.
#
# Usage: launch/two_stage.sh --cluster NAME|FILE --recipe NAME|FILE --run FOLDER --stage1 K --total T [options] [-- MEGATRON ARGUMENTS]
#
#   --stage1 K       iterations with --attention lighthouse
#   --total T        iterations of both stages: --train-iters of both, so that data and learning rate are those of one run
#   --eval-iters N   batches of the evaluation, as in stage 2, on the last checkpoint; 0: none. Default: the run's own --eval-iters
#   --only-check 1   check all three jobs, ask sbatch --test-only, and queue nothing
#   --nodes, --time, --sbatch, --check, --profile as for launch/submit.sh (--profile is for stage 1)
#
# Prints the jobs' numbers. What is done already is not queued again. The loss lands in RUN/evaluation.json.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/study.sh
source "$LAUNCH/study.sh"
# shellcheck source=launch/check.sh
source "$LAUNCH/check.sh"

STAGE1='' TOTAL='' EVAL_ITERS='' SBATCH='' CHECK=1 ONLY_CHECK=0
OWN="--stage1=STAGE1 --total=TOTAL --eval-iters=EVAL_ITERS --sbatch=SBATCH --check=CHECK --only-check=ONLY_CHECK" \
    parse_options "${BASH_SOURCE[0]}" "$@"
check_check
for pair in --stage1=STAGE1 --total=TOTAL; do
    declare -n value=${pair#*=}
    [[ $value =~ ^[1-9][0-9]*$ ]] || {
        wrong "${pair%%=*} $value must be a number of iterations, at least 1: give both, as --stage1 12000 --total 20000."
        value='' STAGE1=${STAGE1:-1}
    }
done
TOTAL=${TOTAL:-$((STAGE1 + 1))}
((STAGE1 < TOTAL)) || wrong "--stage1 $STAGE1 must be less than --total $TOTAL: what is left is stage 2."
for word in "${MEGATRON[@]}"; do
    [[ ! $word =~ ^--(train-iters|train-samples|exit-interval)(=|$) ]] ||
        wrong "${word%%=*} after the -- is what --stage1 and --total say of each job: leave it out."
done
MEGATRON+=(--train-iters "$TOTAL")
run_arguments
at=$(argument --lighthouse-stage2-at '')
[[ -z $at ]] || wrong "--lighthouse-stage2-at $at is both stages in one job, and two_stage.sh queues a job for each: leave it out, or use" \
    "launch/submit.sh for the one job."
warmup=$(argument --lighthouse-dense-warmup-iters '')
[[ -z $warmup ]] || wrong "--lighthouse-dense-warmup-iters $warmup is of stage 1, and stage 2 would refuse it: leave it out, or use" \
    "launch/submit.sh with --lighthouse-stage2-at $STAGE1 for all in one job."
STAGE2=$(stage2_attention)
attention=$(argument --attention lighthouse)
stages="lighthouse $STAGE2"
[[ " $stages " == *" $attention "* ]] || wrong "--attention $attention is neither stage's, which are lighthouse and" \
    "$STAGE2 (--lighthouse-around): leave it out, or use launch/submit.sh, which trains one stage of it."
EVAL_ITERS=${EVAL_ITERS:-$(argument --eval-iters 100)}
[[ $EVAL_ITERS =~ ^[0-9]+$ ]] || {
    wrong "--eval-iters $EVAL_ITERS must be a number of batches: use 32, or 0 for no evaluation."
    EVAL_ITERS=0
}

# a job that waits for that one would go on from where it ends, whichever stage that is
under_way=$(job_under_way train)
[[ -z $under_way ]] || wrong "--run $RUN: its job $under_way (train) is queued or runs. Nothing was queued: scancel $under_way, or wait for its end."

after='' queued=() points=() asked=quietly unreachable=''
# one of the jobs: its label, its name, options of submit.sh, what Megatron is given beyond all stages'. At first Slurm is asked, and its
# words are kept in points; then it is queued, and the next waits for it
queue() {
    local label=$1 name=$2 job options=() status=0
    shift 2
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    [[ -n $unreachable ]] ||
        job=$("$LAUNCH/submit.sh" --cluster "$CLUSTER" --recipe "$RECIPE" --run "$RUN" --nodes "$NODES" --time "$TIME" \
            --check 0 --only-check "$asked" --sbatch "$SBATCH $after" "${options[@]}" -- "${MEGATRON[@]}" "$@") || status=$?
    if ((status == UNREACHABLE)) && [[ $asked == quietly ]]; then
        unreachable=1 # submit.sh said so; what needs no Slurm is checked all the same
    elif ((status)); then
        echo "$name was not queued.${queued[*]:+ Queued are jobs ${queued[*]}: scancel ${queued[*]}, or the same command when they are done.}" >&2
        exit $((status == UNREACHABLE ? UNREACHABLE : 2))
    fi
    if [[ $asked == quietly ]]; then
        [[ $label != evaluation ]] || set -- "$@" --skip-train --exit-on-missing-checkpoint
        points+=(--point "$label $*")
        return
    fi
    echo "$name: job $job"
    queued+=("$job")
    after="--dependency=afterok:$job --kill-on-invalid-dep=yes"
}

jobs_left() {
    (($(iteration) >= STAGE1)) ||
        queue stage-1 "stage 1, to iteration $STAGE1" "${profile[@]}" -- --attention lighthouse --exit-interval "$STAGE1"
    (($(iteration) >= TOTAL)) || queue stage-2 "stage 2, to iteration $TOTAL" -- --attention "$STAGE2"
    if ((EVAL_ITERS)) && { ((${#points[@]})) || ! evaluated; }; then
        queue evaluation evaluation --as evaluation -- --attention "$STAGE2" --eval-iters "$EVAL_ITERS"
    fi
}

profile=()
[[ -z $PROFILE ]] || profile=(--profile "$PROFILE" --profile-steps "$PROFILE_STEPS" --profile-ranks "$PROFILE_RANKS")
((${#WRONG[@]} == 0)) || unreachable=1 # Slurm is not asked for what is refused anyway
jobs_left # all are checked before one is queued
((${#points[@]})) || die_if_wrong
if ((${#points[@]} == 0)); then
    echo "$RUN is at iteration $(iteration), and evaluated: there is nothing to queue"
    exit
fi
if [[ $CHECK != 0 ]]; then
    [[ -n $IMAGE ]] || find_profiler env
    check_here "${points[@]}" >&2 || nothing_queued
fi
die_if_wrong # which the check has said, unless it is none of ours
[[ -z $unreachable ]] || exit "$UNREACHABLE"
if ((ONLY_CHECK)); then
    say_only_checked
    exit
fi
asked=0
jobs_left
