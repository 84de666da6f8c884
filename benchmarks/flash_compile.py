"""`python benchmarks/flash_compile.py --to FOLDER`: compiles FlashAttention 4's kernels for Hopper on a machine without a GPU.

The blocks of `flash_blocks.py` and the layers of `rings.py` are called on tensors that hold nothing, as FlashAttention 4
allows for. Their kernels are then in its cache, FOLDER, for a GPU that is lent by the minute; and what does not compile is
known before. Ends with status 1 where one does not. `--quick` compiles those of one shape. Used there by

    export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 FLASH_ATTENTION_CUTE_DSL_CACHE_DIR=FOLDER
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from flash_blocks import CASES, CHECKED, TIMED, Case, Shape, backward, forward, rows_of
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_lighthouse.softmax.backends import FAMILIES
from megatron_lighthouse.softmax.flash_blocks import Flash4
from megatron_lighthouse.softmax.rows import SHARDS, RowKind

TARGET = {
    "FLASH_ATTENTION_ARCH": "sm_90",
    "CUTE_DSL_ARCH": "sm_90a",
    "FLASH_ATTENTION_NUM_SMS": "132",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
}
"""An H100 or H200."""
LAYER = Shape(2048, 1, 8, 8, 128)
"""Of rings.py, whose rows are more: no kernel is compiled for their number."""


def compiled(shape: Shape, case: Case, dtype: torch.dtype, deterministic: bool) -> None:
    """A block forward and backward, of tensors that hold nothing."""
    torch.use_deterministic_algorithms(deterministic)
    kind = RowKind(torch.device("cuda"), dtype, shape.heads, shape.groups, shape.dim, shape.dim)
    if problem := FAMILIES[SHARDS]["fa4"].problem(kind):
        raise ValueError(f"FlashAttention 4 {problem}")
    block, rows = Flash4(shape.dim**-0.5, case.window), rows_of(shape, case, dtype, "cuda")
    backward(block, case, rows, forward(block, case, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    # read where FlashAttention is imported, which is at the first call
    os.environ |= {**TARGET, "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(options.to.resolve())}
    shapes = [LAYER] if options.quick else [LAYER, CHECKED[0], *TIMED[:2], *CHECKED[1:]]
    todo = [
        (shape, case, dtype, deterministic)
        for shape in shapes
        for case in (CASES[:1] if options.quick else CASES if shape in CHECKED else CASES[:3])
        for dtype, deterministic in product((torch.bfloat16, torch.float16), (False, True))
        if dtype == torch.bfloat16 or shape == CHECKED[0]
    ]
    failed = 0
    hopper = mock.patch.multiple(torch.cuda, current_device=lambda: 0, get_device_capability=lambda *_: (9, 0))
    with FakeTensorMode(), hopper:
        for shape, case, dtype, deterministic in todo:
            begun, said = time.monotonic(), "compiled"
            try:
                compiled(shape, case, dtype, deterministic)
            except Exception as error:  # of any of its layers; the others are compiled all the same
                failed, said = failed + 1, f"{type(error).__name__}: {str(error)[:500]}"
            how = f"{case.title}, {shape.heads}/{shape.groups} heads of {shape.dim}, {dtype}, deterministic {deterministic}"
            print(f"{time.monotonic() - begun:5.1f} s: {how}: {said}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
