#!/usr/bin/env bash
# Expected: --qk-l2-norm norms queries and keys, whatever makes the layers.
# megatron-core 0.19.2, --transformer-impl local: a GPT of like layers is built without the norm, and nothing is said
# (training/models/gpt.py, default_layer_spec and what it calls: qk_l2_norm is passed on with Transformer Engine alone). The local spec knows
# the option, and a block of unlike layers (experts in some) has it. A checkpoint that was trained with the norm loads, for it has no weights.
# What we do: the norms are put into the spec (mcore/attention/norm.py, take_l2_norms).
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
import torch
from megatron.core import __version__
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import L2Norm
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

print("megatron-core", __version__, "torch", torch.__version__)


def norms(layer):
    """Of queries and keys."""
    attention = layer.submodules.self_attention.submodules
    return attention.q_layernorm, attention.k_layernorm


config = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=1, qk_l2_norm=True, transformer_impl="local")
built = norms(default_layer_spec(GPTModelConfig(transformer=config, vocab_size=64, seq_length=8), None))
print("the spec of a model that asks for it:", *built)
print("the same spec, asked itself:         ", *norms(get_gpt_layer_local_spec(qk_l2_norm=True)))
assert built == (IdentityOp, IdentityOp)
assert norms(get_gpt_layer_local_spec(qk_l2_norm=True)) == (L2Norm, L2Norm)
EOF
venv/bin/python -W ignore finding.py
