#!/usr/bin/env bash
# Expected: --dataloader-inter-document-masking with context parallelism gives each token the RoPE of one process.
# megatron-core 0.19.2: the batch is cut into zigzag chunks of the row (core/utils.py, get_batch_on_this_cp_rank with
# use_per_sequence_balancing, whose docstring names this masking), while RoPE takes a rank's rows for zigzag chunks of every document
# (core/models/common/embeddings/rope_utils.py, _apply_rotary_pos_emb_thd): with lengths that context parallelism divides, the angles are
# wrong and nothing is said; with others it raises. Documents and many ranks are what long-context training is made of.
# What we do: every document is cut into zigzag chunks, and a token is rotated by its place in its document (sequence/documents.py).
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
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
from megatron.core.utils import get_batch_on_this_cp_rank
from torch.testing._internal.distributed.fake_pg import FakeStore

print("megatron-core", __version__, "torch", torch.__version__)
LENGTH, CP, CHANNELS = 128, 2, 8


class Rank:
    """All that RoPE asks a process group."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


def rope(rows, cu_seqlens, rank, size):
    """Rows [tokens, 1, channels] rotated; angles for the longest document's positions, as GPTModel gives them."""
    positions = torch.arange(int(cu_seqlens.diff().max())).float()
    angles = torch.outer(positions, 100 ** (-torch.arange(CHANNELS // 2) / (CHANNELS // 2)))
    return _apply_rotary_pos_emb_thd(rows, cu_seqlens, torch.cat((angles, angles), -1)[:, None, None], cp_group=Rank(rank, size))


def zigzag(tokens, rank):
    chunks = tokens.chunk(2 * CP)
    return torch.cat((chunks[rank], chunks[2 * CP - 1 - rank]))


def documents(cu_seqlens, rank):
    """The cut that RoPE assumes."""
    return torch.cat([zigzag(tokens, rank) for tokens in torch.arange(LENGTH).tensor_split(cu_seqlens[1:-1].long())])


def megatron(cu_seqlens, rank):
    """The cut that the batch gets."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=CP)
    batch = {"tokens": torch.arange(LENGTH)[None], "cu_seqlens": cu_seqlens[None]}
    batch = get_batch_on_this_cp_rank(batch, False, torch.distributed.group.WORLD, use_per_sequence_balancing=True)
    torch.distributed.destroy_process_group()
    return batch["tokens"][0]


def error(bounds, cut):
    """The largest difference from one process, over both ranks."""
    cu_seqlens, rows = torch.tensor(bounds, dtype=torch.int32), torch.ones(LENGTH, 1, CHANNELS)
    whole = rope(rows, cu_seqlens, 0, 1)
    shards = [cut(cu_seqlens, rank) for rank in range(CP)]
    return max((rope(rows[mine], cu_seqlens, rank, CP) - whole[mine]).abs().max().item() for rank, mine in enumerate(shards))


one, expected, two = error([0, 128], megatron), error([0, 64, 128], documents), error([0, 64, 128], megatron)
print("one document of 128, Megatron's batch:         error", one)
print("two documents of 64, cut by document:          error", expected)
print("two documents of 64, Megatron's batch:         error", two)
try:
    ragged = str(error([0, 61, 124, 128], megatron))
except RuntimeError as raised:
    ragged = str(raised)
print("documents of 61, 63 and 4, Megatron's batch:  ", ragged)
assert one == expected == 0 and two > 1
assert ragged.startswith("split_with_sizes expects split_sizes to sum exactly to 64"), ragged
EOF
venv/bin/python -W ignore finding.py
