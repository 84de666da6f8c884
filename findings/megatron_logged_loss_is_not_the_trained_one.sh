#!/usr/bin/env bash
# Expected: under a loss mask the gradient is that of the logged loss, and context parallelism, which cuts one sequence, changes neither.
# megatron-core 0.19.2: each rank divides its sum by its own count of tokens and the ranks are averaged (core/pipeline_parallel/
# schedules.py, forward_step_calc_loss; core/distributed/distributed_data_parallel.py, gradient_scaling_factor), while the log divides the
# sums: where masks leave ranks different counts, the log of two ranks equals that of one and the gradient does not, unless
# --calculate-per-token-loss. Answers at a long prompt's end, or padding, do just that; comparing logs cannot find it.
# What we do: tokens get their weights from the whole sequence, before it is cut (mcore/loop/forward_step.py, token_weights).
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
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
from megatron.core.transformer import TransformerConfig

print("megatron-core", __version__, "torch", torch.__version__)
LOSSES, MASK = torch.arange(1.0, 9.0), torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0])  # one sequence of 8 tokens, 5 of which count


def train(ranks, per_token):
    """The logged loss and the gradient of weight · LOSSES on `ranks` context-parallel ranks, one after the other."""
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, calculate_per_token_loss=per_token)
    weight, log, tokens = torch.ones((), requires_grad=True), [], 0
    for rank in range(ranks):
        chunks = torch.arange(8).chunk(2 * ranks)
        mine = torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]))

        def loss_func(losses, mask=MASK[mine]):
            """As pretrain_gpt.py's: the sum, the count of tokens, and both for the log."""
            total, count = (losses * mask).sum(), mask.sum().int()
            return total, count, torch.stack((total.detach(), count))

        loss, count = forward_step_calc_loss(None, weight * LOSSES[mine], loss_func, config, None, False, 1, log, ranks, True)
        loss.backward()
        tokens += int(count)
    total, counted = sum(log).tolist()
    return total / counted, weight.grad.item() / (tokens if per_token else ranks)  # as DDP, or finalize_model_grads, divides


seen = {(ranks, per_token): train(ranks, per_token) for per_token in (False, True) for ranks in (1, 2)}
for (ranks, per_token), (logged, gradient) in seen.items():
    print(f"{ranks} context-parallel rank(s), calculate_per_token_loss {per_token}: logged loss {logged}, gradient {gradient}")
assert seen == {(1, False): (3, 3), (2, False): (3, 2.75), (1, True): (3, 3), (2, True): (3, 3)}
EOF
venv/bin/python -W ignore finding.py
