#!/usr/bin/env bash
# Stage 1 with Lighthouse, stage 2 dense: two jobs, the second of which waits for the first to be done, requeues included.
#
# Usage: launch/two_stage.sh --profile NAME|FILE --recipe NAME|FILE --run FOLDER --stage1 K --total T [-- MEGATRON ARGUMENTS]
#
#   --stage1 K   iterations with --attention lighthouse
#   --total T    iterations of both stages: --train-iters of both, so that data and learning rate are those of one run
#   --nodes, --time, --sbatch as for launch/submit.sh
#
# Prints both jobs' numbers. Where stage 1 is done already, stage 2 alone is queued.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

STAGE1='' TOTAL='' SBATCH=''
OWN="--stage1=STAGE1 --total=TOTAL --sbatch=SBATCH" parse_options "${BASH_SOURCE[0]}" "$@"
for pair in --stage1=STAGE1 --total=TOTAL; do
    [[ $(declare -n value=${pair#*=} && echo "$value") =~ ^[1-9][0-9]*$ ]] || die "${pair%%=*} must be a number of iterations: see --help."
done
((STAGE1 < TOTAL)) || die "--stage1 $STAGE1 must be less than --total $TOTAL: what is left is stage 2."

submit=("$LAUNCH/submit.sh" --profile "$PROFILE" --recipe "$RECIPE" --run "$RUN" --nodes "$NODES" --time "$TIME")
after=''
if (($(iteration) < STAGE1)); then
    first=$("${submit[@]}" --sbatch "$SBATCH" -- "${MEGATRON[@]}" \
        --attention lighthouse --train-iters "$TOTAL" --exit-interval "$STAGE1")
    echo "stage 1: job $first, to iteration $STAGE1"
    after="--dependency=afterok:$first --kill-on-invalid-dep=yes"
fi
second=$("${submit[@]}" --sbatch "$SBATCH $after" -- "${MEGATRON[@]}" --attention dense --train-iters "$TOTAL")
echo "stage 2: job $second, to iteration $TOTAL"
