#!/usr/bin/env bash
# Expected: TRITON_INTERPRET=1 runs what the compiler takes. The mask of a block may be a scalar condition, alone or beside
# others, as in mask=(columns < width) & (row < rows).
# triton 3.9.0: ValueError('mask has unsupported dtype'), of load and of store. What a comparison gives is still labelled with
# its operands' dtype, and create_splat (runtime/interpreter.py) fills the block with that: a mask of int32. Up to 3.8 the
# interpreter's load and store took any dtype; those of 3.9 take bool alone.
# Such masks are common, for a row or a head that may not be there. Where there is no GPU the kernel's tests end so, though the
# kernel is right.
# What we do: a condition that the interpreter broadcasts stays one (tests/interpreter.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.12 python3.13 python3 ~/.pyenv/versions/3.1[2-9]*/bin/python3; do
    "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.15.0 numpy==2.5.5 triton==3.9.0
cd "$folder"
cat >finding.py <<'EOF'
import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def of_a_block(x, out, rows):
    i = tl.arange(0, 8)
    tl.store(out + i, tl.load(x + i, mask=i < rows, other=7.0))


@triton.jit
def of_a_scalar(x, out, rows):
    i = tl.arange(0, 8)
    tl.store(out + i, tl.load(x + i, mask=tl.program_id(0) < rows, other=7.0))


@triton.jit
def of_both(x, out, rows):
    i = tl.arange(0, 8)
    tl.store(out + i, tl.load(x + i, mask=(i < 4) & (tl.program_id(0) < rows), other=7.0))


@triton.jit
def of_a_store(x, out, rows):
    i = tl.arange(0, 8)
    tl.store(out + i, tl.load(x + i), mask=tl.program_id(0) < rows)


KERNELS = of_a_block, of_a_scalar, of_both, of_a_store
if sys.argv[1:] == ["compile"]:
    print("triton", triton.__version__, "torch", torch.__version__)
    for kernel in KERNELS:
        source = ASTSource(kernel, signature={"x": "*fp32", "out": "*fp32", "rows": "i32"})
        assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
        print("compiled for a GPU:", kernel.__name__)
    sys.exit()
said = {}
for kernel in KERNELS:
    out = torch.zeros(8)
    try:
        kernel[(1,)](torch.ones(8), out, 1)
        said[kernel] = str(out.int().tolist())
    except Exception as error:
        said[kernel] = repr(error)
    print("interpreted:", kernel.__name__, said[kernel])
assert said[of_a_block] == "[1, 7, 7, 7, 7, 7, 7, 7]", said
assert all("mask has unsupported dtype" in said[kernel] for kernel in KERNELS[1:]), "the interpreter takes such masks now"
EOF
venv/bin/python -W ignore finding.py compile
TRITON_INTERPRET=1 venv/bin/python -W ignore finding.py
