#!/usr/bin/env bash
# Expected: --window-size 1,1 in a causal model lets a token see itself and one before it, as with Transformer Engine, which makes (1, 0) of
# it; and --window-size -1,0 lets it see all before it, for "-1 is special value meaning infinite window size" (TransformerConfig).
# megatron-core 0.19.2, --transformer-impl local: with (1, 1) a token sees the one after it, and with (-1, 0) it is shown none at all; then
# all scores are -10000 and it attends to all tokens alike, later ones too (fusions/fused_softmax.py; transformer/utils.py,
# get_sliding_window_causal_mask). Nothing is said, and the training loss is better than it should be.
# What we do: such windows are refused with the local layers (mcore/command_line/own_parts.py, local_window_problem).
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
from unittest import mock

import torch
from megatron.core import __version__
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import attention_mask_func

print("megatron-core", __version__, "torch", torch.__version__)
ones = torch.ones


def weights(window):
    """Of four tokens with equal scores. The mask is made on a GPU: here on the CPU."""
    softmax = FusedScaleMaskSoftmax(False, False, AttnMaskType.causal, False, attention_mask_func, True, None, window)
    with mock.patch("torch.ones", lambda *sizes, device=None, **more: ones(*sizes, **more)):
        return softmax(torch.zeros(1, 1, 4, 4), None)[0, 0]


for window in ((1, 0), (1, 1), (-1, 0)):
    print("window", window)
    print(weights(window))
assert not weights((1, 0)).triu(1).any()
assert (weights((1, 1)).diagonal(1) > 0.3).all()
assert torch.equal(weights((-1, 0)), torch.full((4, 4), 0.25))
EOF
venv/bin/python -W ignore finding.py
