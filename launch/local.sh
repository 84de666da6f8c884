#!/usr/bin/env bash
# The same run on this machine, by torchrun and without Slurm.
#
# Usage: launch/local.sh --profile NAME|FILE --recipe NAME|FILE --run FOLDER [--gpus N] [-- MEGATRON ARGUMENTS]
#
#   --gpus N   processes, instead of the profile's GPUS_PER_NODE
#
# Its log is RUN/logs/local.log and the terminal. SIGTERM saves and ends it; the same command goes on from there.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS=''
OWN="--gpus=GPUS" parse_options "${BASH_SOURCE[0]}" "$@"
GPUS=${GPUS:-$GPUS_PER_NODE}
run_arguments
architecture_environment
"$PYTHON" -m megatron_lighthouse.launch.check --nodes 1 --gpus-per-node "$GPUS" -- "${ARGUMENTS[@]}"
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" --no-python bash "$LAUNCH/task.sh" \
    "$PYTHON" -m megatron_lighthouse.pretrain_gpt "${ARGUMENTS[@]}" 2>&1 | tee -a "$RUN/logs/local.log"
