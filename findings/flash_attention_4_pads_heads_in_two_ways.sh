#!/usr/bin/env bash
# Expected: FlashAttention 4 on Hopper (flash_attn.cute) gives right gradients for the heads that its interface takes: up to 256
# channels, a multiple of 8.
# flash-attn-4 4.0.0b36: up to 128 channels the backward's kernel (flash_bwd_sm90.py) fills a head up to a multiple of 16, and the
# sum of the queries' gradient is allocated (interface.py) and read (flash_bwd_postprocess.py) as if it were filled up to one of 32.
# Blocks of rows are written at one stride and read at another, so of 8, 16, 40, 48, 72, 80, 104 and 112 channels the queries'
# gradient is wrong, and nothing says so (flash-attention pull 2896, open, has it of 72 and 104 channels, seen on a GPU).
# What this shows needs no GPU: both numbers of channels, as the package's own classes make them.
# What we do: there such heads go to another backend (HOPPER in megatron_lighthouse/softmax/names.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.12 python3.13 python3 ~/.pyenv/versions/3.1[2-9]*/bin/python3; do
    "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.14.1 numpy==2.5.5 einops==0.8.2
"$folder/venv/bin/pip" install --quiet --no-compile --no-deps flash-attn-4==4.0.0b36 quack-kernels==0.6.5 \
    torch-c-dlpack-ext==0.1.5 apache-tvm-ffi==0.1.15.post2 nvidia-cutlass-dsl==4.8.1 \
    nvidia-cutlass-dsl-libs-{base,core,cu13}==4.8.1
cd "$folder"
cat >finding.py <<'EOF'
import cutlass
from flash_attn.cute.flash_bwd_postprocess import FlashAttentionBackwardPostprocess
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.interface import _tile_size_bwd_sm90

differ = []
for channels in range(8, 257, 8):
    chosen = _tile_size_bwd_sm90(channels, channels, True, False)
    swapped = chosen.dKV_swapAB
    names = ("dQ_swapAB", "AtomLayoutMSdP", "AtomLayoutNdKV", "AtomLayoutMdQ", "SdP_swapAB", "dKV_swapAB", "dQ_single_wg")
    kernel = FlashAttentionBackwardSm90(
        cutlass.BFloat16,
        channels,
        is_causal=True,
        tile_m=chosen.m_block_size,
        tile_n=chosen.n_block_size,
        Q_stage=chosen.num_stages_Q,
        dO_stage=chosen.num_stages_dO,
        PdS_stage=chosen.num_stages_PdS,
        num_threads=128 * (chosen.num_wg + 1),
        **{name: getattr(chosen, name) for name in names},
    )
    reader = FlashAttentionBackwardPostprocess(
        cutlass.BFloat16, channels, 90, tile_m=chosen.m_block_size, hdim_multiple_of=64 if swapped else 32
    )
    if kernel.tile_hdim != reader.tile_hdim:
        differ.append(channels)
        print(f"{channels} channels: written as {kernel.tile_hdim}, read as {reader.tile_hdim}")
assert differ == [8, 16, 40, 48, 72, 80, 104, 112], differ
EOF
FLASH_ATTENTION_ARCH=sm_90 CUTE_DSL_ARCH=sm_90a venv/bin/python -W ignore finding.py
