#!/usr/bin/env bash
# Stage 1 with Lighthouse, stage 2 dense, then an evaluation: three jobs, each of which waits for the one before to be done,
# requeues included.
#
# Usage: launch/two_stage.sh --cluster NAME|FILE --recipe NAME|FILE --run FOLDER --stage1 K --total T [options] [-- MEGATRON ARGUMENTS]
#
#   --stage1 K       iterations with --attention lighthouse
#   --total T        iterations of both stages: --train-iters of both, so that data and learning rate are those of one run
#   --eval-iters N   batches of the evaluation, dense, on the last checkpoint; 0: none. Default: the run's own --eval-iters
#   --nodes, --time, --sbatch, --check, --profile as for launch/submit.sh (--profile is for stage 1)
#
# Prints the jobs' numbers. What is done already is not queued again. The loss lands in RUN/evaluation.json.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

STAGE1='' TOTAL='' EVAL_ITERS='' SBATCH='' CHECK=1
OWN="--stage1=STAGE1 --total=TOTAL --eval-iters=EVAL_ITERS --sbatch=SBATCH --check=CHECK" parse_options "${BASH_SOURCE[0]}" "$@"
for pair in --stage1=STAGE1 --total=TOTAL; do
    [[ $(declare -n value=${pair#*=} && echo "$value") =~ ^[1-9][0-9]*$ ]] || die "${pair%%=*} must be a number of iterations: see --help."
done
((STAGE1 < TOTAL)) || die "--stage1 $STAGE1 must be less than --total $TOTAL: what is left is stage 2."
MEGATRON+=(--train-iters "$TOTAL")
run_arguments
at=$(argument --lighthouse-stage2-at '')
[[ -z $at ]] || die "--lighthouse-stage2-at $at is both stages in one job, and two_stage.sh queues a job for each: leave it out, or use" \
    "launch/submit.sh for the one job."
EVAL_ITERS=${EVAL_ITERS:-$(argument --eval-iters 100)}
[[ $EVAL_ITERS =~ ^[0-9]+$ ]] || die "--eval-iters $EVAL_ITERS must be a number of batches: use 32, or 0 for no evaluation."

# a job that waits for that one would go on from where it ends, whichever stage that is
under_way=$(job_under_way train)
[[ -z $under_way ]] || die "--run $RUN: its job $under_way (train) is queued or runs. Nothing was queued: scancel $under_way, or wait for its end."

after='' queued=() needed=0
# queue the job that the others then wait for, or with ONLY=1 check it: its name, options of submit.sh, what Megatron is given beyond
# all stages'
queue() {
    local name=$1 job options=()
    needed=1
    while [[ $2 != -- ]]; do
        options+=("$2")
        set -- "$1" "${@:3}"
    done
    job=$("$LAUNCH/submit.sh" --cluster "$CLUSTER" --recipe "$RECIPE" --run "$RUN" --nodes "$NODES" --time "$TIME" \
        --check "$CHECK" --only-check "$ONLY" --sbatch "$SBATCH $after" "${options[@]}" -- "${MEGATRON[@]}" "${@:3}") ||
        die "$name was not queued.${queued[*]:+ Queued are jobs ${queued[*]}: scancel ${queued[*]}, or the same command when they are done.}"
    ((ONLY == 0)) || return 0
    echo "$name: job $job"
    queued+=("$job")
    after="--dependency=afterok:$job --kill-on-invalid-dep=yes"
}

profile=()
[[ -z $PROFILE ]] || profile=(--profile "$PROFILE" --profile-steps "$PROFILE_STEPS" --profile-ranks "$PROFILE_RANKS")
for ONLY in 1 0; do # all are checked before one is queued
    (($(iteration) >= STAGE1)) ||
        queue "stage 1, to iteration $STAGE1" "${profile[@]}" -- --attention lighthouse --exit-interval "$STAGE1"
    (($(iteration) >= TOTAL)) || queue "stage 2, to iteration $TOTAL" -- --attention dense
    if ((EVAL_ITERS)) && { ((needed)) || ! evaluated; }; then
        queue "evaluation" --as evaluation -- --eval-iters "$EVAL_ITERS"
    fi
    CHECK=0 # done
done
((needed)) || echo "$RUN is at iteration $(iteration), and evaluated: there is nothing to queue"
