#!/usr/bin/env bash
# Expected: --use-rope-scaling --rope-scaling-factor 32 (Llama 3.2) stretches RoPE by 32, and --rampup-batch-size 16 8 300000 starts at 16.
# megatron-core 0.19.2: both are parsed and end in the arguments; the model is built with factor 8 and the batch is whole from the start,
# without a word (training/argument_utils.py, gpt_config_from_args; training/global_vars.py, set_global_variables: neither passes it on).
# The help of both describes what they did. Wrong angles at long context look like a model that merely learns slowly, and a
# Llama 3.2 checkpoint loads without complaint.
# What we do: the factor is passed on, the batch ramp is refused by name (mcore/command_line/arguments.py, unread.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.12 python3.13 python3 ~/.pyenv/versions/3.1[2-9]*/bin/python3; do
    "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.14.1 numpy==2.5.5 megatron-core==0.19.2
cd "$folder"
cat >finding.py <<'EOF'
import inspect
import sys

import torch
from megatron.core import __version__
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.core.transformer import TransformerConfig
from megatron.training import global_vars
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import parse_args

print("megatron-core", __version__, "torch", torch.__version__)
sys.argv[1:] = """--use-rope-scaling --rope-scaling-factor 32 --rampup-batch-size 16 8 300000 --global-batch-size 1024
    --position-embedding-type rope --micro-batch-size 1 --vocab-size 128 --num-layers 1 --hidden-size 8 --num-attention-heads 1
    --seq-length 64 --max-position-embeddings 64""".split()
args = parse_args()
model = gpt_config_from_args(args, TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
args.data_parallel_size = args.gtp_weight_remat_size = 1  # as validate_args finds on one GPU
global_vars.set_global_variables(args, build_tokenizer=False)
batch = get_current_global_batch_size()
print("arguments:", args.use_rope_scaling, args.rope_scaling_factor, args.rampup_batch_size)
print("model:    ", model.rope_scaling, model.rope_scaling_factor)
print("the first global batch:", batch)
assert args.rope_scaling_factor == 32 and args.rampup_batch_size == [16, 8, 300000]
assert model.rope_scaling is True and model.rope_scaling_factor == 8
assert batch == 1024
EOF
venv/bin/python -W ignore finding.py
