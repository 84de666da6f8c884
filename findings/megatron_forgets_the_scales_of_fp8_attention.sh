#!/usr/bin/env bash
# Expected: a run with FP8 attention (TransformerConfig.fp8_dot_product_attention) that is resumed from a torch_dist checkpoint goes on
# with the scales that it had: Transformer Engine keeps them as a module's extra state, and Megatron stores that of linear layers.
# megatron-core 0.19.2: TEDotProductAttention.sharded_state_dict (core/extensions/transformer_engine.py) asks for the module's state
# where it learns sinks alone, and answers nothing otherwise. A resumed run begins with scales of 1, so that gradients below what E5M2
# holds are 0 until the first step has made others; nothing is said. Without Transformer Engine the class is a mock, so what runs here
# is its method, taken from Megatron's file.
# What we do: our class stores the extra state too, and a checkpoint without it is taken, which is said (mcore/attention/scales.py).
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
import ast
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from megatron.core import __version__
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

print("megatron-core", __version__, "torch", torch.__version__)
torch.distributed.init_process_group("gloo", init_method=Path("store").absolute().as_uri(), rank=0, world_size=1)
GROUP = torch.distributed.group.WORLD
SOURCE = Path(find_spec("megatron.core").submodule_search_locations[0], "extensions", "transformer_engine.py")


def sharded_state_dict():
    """TEDotProductAttention's."""
    tree = ast.parse(SOURCE.read_text())
    (attention,) = (node for node in ast.walk(tree) if getattr(node, "name", None) == "TEDotProductAttention")
    method = next(node for node in attention.body if getattr(node, "name", None) == "sharded_state_dict")
    method.decorator_list, method.returns = [], None
    for argument in method.args.args:
        argument.annotation = None
    names = {"make_sharded_tensors_for_checkpoint": make_sharded_tensors_for_checkpoint}
    exec(compile(ast.Module([method], []), str(SOURCE), "exec"), names)
    return names["sharded_state_dict"]


def stored(softmax_type):
    """What a checkpoint gets of a module that has scales, as Transformer Engine's state_dict names them."""
    scales = {"_extra_state": torch.ones(16, dtype=torch.uint8)}
    module = SimpleNamespace(
        config=SimpleNamespace(softmax_type=softmax_type), _tp_group=GROUP, state_dict=lambda prefix, keep_vars: scales
    )
    return sorted(sharded_state_dict()(module, "core_attention.", (), {"dp_cp_group": GROUP}))


plain, sinks = stored("vanilla"), stored("learnable")
print("stored of an attention with scales:", plain)
print("stored of one that learns sinks too:", sinks)
assert plain == []
assert sinks == ["core_attention._extra_state"]
EOF
venv/bin/python -W ignore finding.py
