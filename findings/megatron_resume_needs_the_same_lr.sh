#!/usr/bin/env bash
# Expected: a run resumed with another --lr takes it; --override-opt-param-scheduler exists for that.
# megatron-core 0.19.2: loading the optimizer raises "Could not find parameter group", as max_lr and min_lr are part of the key by which
# a checkpoint's groups are found (core/optimizer/optimizer.py, param_group_identifier_keys, _filter_and_reorder_param_groups);
# the option reaches the scheduler alone. A flag that changes between stages is the rule in long-context training: the second stage
# and each extension of the length want a lower rate from the same moments.
# What we do: the key is made of all but the rates, and the groups take the run's (mcore/loop/rates.py).
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
from pathlib import Path

import torch
from megatron.core import __version__
from megatron.core.optimizer import OptimizerConfig, _get_param_groups
from megatron.core.optimizer.optimizer import MegatronOptimizer

print("megatron-core", __version__, "torch", torch.__version__)
torch.distributed.init_process_group("gloo", init_method=Path("store").absolute().as_uri(), rank=0, world_size=1)
model = torch.nn.Linear(2, 2)


def groups(lr):
    """What the optimizer is built from, and what a checkpoint keeps of it."""
    return _get_param_groups([model], OptimizerConfig(optimizer="adam", lr=lr, min_lr=lr / 10), None)


def load(lr):
    """A checkpoint of --lr 1e-3 into a run with `lr`: the number of groups found, or the error."""
    try:
        return len(MegatronOptimizer._filter_and_reorder_param_groups(groups(lr), groups(1e-3)))
    except ValueError as error:
        return str(error)


same, other = load(1e-3), load(2e-3)
print("saved with lr 0.001, loaded with 0.001:", same, "group found")
print("saved with lr 0.001, loaded with 0.002:", other)
assert same == 1
assert isinstance(other, str) and other.startswith("Could not find parameter group with key (None, 0.002, 0.0002,"), other
EOF
venv/bin/python -W ignore finding.py
