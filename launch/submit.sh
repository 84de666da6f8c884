#!/usr/bin/env bash
# Check a run and queue it.
#
# Usage: launch/submit.sh --profile NAME|FILE --recipe NAME|FILE --run FOLDER [options] [-- MEGATRON ARGUMENTS]
#
#   --profile NAME|FILE   the cluster: launch/profiles/NAME.env, or a file of KEY=VALUE lines
#   --recipe NAME|FILE    the model: launch/recipes/NAME.args, or a file of Megatron's arguments
#   --run FOLDER          checkpoints, logs, tensorboard; on a file system that all nodes share
#   --nodes N, --time T   instead of the profile's
#   --script NAME         pretrain (default)
#   --sbatch "FLAGS"      more flags of sbatch, such as "--dependency=afterok:7 --exclude=node3"
#   --check 0             do not check the layout and the data here (a login node without torch)
#   --only-check 1        check, ask sbatch --test-only, and queue nothing
#
# Prints the job's number. Data is among Megatron's arguments: --data-path, --text-data or --mock-data.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SCRIPT=pretrain SBATCH='' CHECK=1 ONLY_CHECK=0
OWN="--script=SCRIPT --sbatch=SBATCH --check=CHECK --only-check=ONLY_CHECK" parse_options "${BASH_SOURCE[0]}" "$@"
[[ -r $LAUNCH/$SCRIPT.sbatch ]] || die "--script $SCRIPT is not there: use $(cd "$LAUNCH" && words ./*.sbatch)."
run_arguments

if ((CHECK)); then
    "$PYTHON" -m megatron_lighthouse.launch.check --nodes "$NODES" --gpus-per-node "$GPUS_PER_NODE" -- "${ARGUMENTS[@]}" >&2 ||
        die "Nothing was queued. (--check 0 leaves this check out, where $PYTHON has no torch.)"
fi

flags=(--job-name="$(basename "$RUN")" --nodes="$NODES" --ntasks-per-node="$GPUS_PER_NODE" --time="$TIME"
    --signal="URG@$SIGNAL_SECONDS" --output="$RUN/logs/%j.log" --requeue --open-mode=append)
[[ -z $PARTITION ]] || flags+=(--partition="$PARTITION")
[[ -z $ACCOUNT ]] || flags+=(--account="$ACCOUNT")
[[ -z $QOS ]] || flags+=(--qos="$QOS")
[[ -z $SEGMENT ]] || flags+=(--segment="$SEGMENT")
[[ -z $CPUS_PER_TASK ]] || flags+=(--cpus-per-task="$CPUS_PER_TASK")
((EXCLUSIVE == 0)) || flags+=(--exclusive --mem=0)
[[ $ARCH == cpu ]] || flags+=(--gpus-per-node="$GPUS_PER_NODE")
read -ra more <<<"$SBATCH"
flags+=("${more[@]}")

export LIGHTHOUSE_LAUNCH=$LAUNCH
job=("$LAUNCH/$SCRIPT.sbatch" --profile "$PROFILE" --recipe "$RECIPE" --run "$RUN" --nodes "$NODES" -- "${MEGATRON[@]}")
sbatch --test-only "${flags[@]}" "${job[@]}" >&2 || die "Nothing was queued: Slurm refuses the flags above."
((ONLY_CHECK)) || sbatch --parsable "${flags[@]}" "${job[@]}"
