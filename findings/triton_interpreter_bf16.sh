#!/usr/bin/env bash
# Expected: TRITON_INTERPRET=1 computes bf16 as a GPU does, slowly: rounded to nearest, products of the values.
# triton 3.8.0: tl.dot of bf16 operands multiplies their raw 16 bits as integers (1 · 2 gives 266338304), and a float32 is cut off to
# bf16 rather than rounded (runtime/interpreter.py: bf16 is kept as numpy's uint16; create_dot, _convert_float). float16 is right.
# Attention at long context is trained in bf16, and its kernels' tests run in the interpreter where there is no GPU: a bf16 dot
# tested so says nothing about the kernel, and a bias of half a unit in the last place is the interpreter's.
# What we do: bf16 of the kernels is tested on GPUs alone (tests/steps.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.12 python3.13 python3 ~/.pyenv/versions/3.1[2-9]*/bin/python3; do
    "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.14.1 numpy==2.5.5 triton==3.8.0
cd "$folder"
cat >finding.py <<'EOF'
import torch
import triton
import triton.language as tl

print("triton", triton.__version__, "torch", torch.__version__)
N = 16


@triton.jit
def dot(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def cast(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(tl.bfloat16))


products = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    out = torch.zeros(N, N)
    dot[(1,)](torch.eye(N, dtype=dtype), torch.full((N, N), 2, dtype=dtype), out, N)
    assert (out == out[0, 0]).all()
    products[dtype] = out[0, 0].item()
    print(f"tl.dot of the unit matrix and a matrix of twos, {dtype}: {products[dtype]}")
x = 1 + torch.arange(N) / 2**10  # eighths of bf16's step above 1
rounded, out = x.bfloat16(), torch.zeros(N, dtype=torch.bfloat16)
cast[(1,)](x, out, N)
steps = [((y.float() - 1) * 2**7).int().tolist() for y in (rounded, out)]
print("float32 to bf16, in steps above 1, torch: ", *steps[0])
print("float32 to bf16, in steps above 1, triton:", *steps[1])
bits = [torch.tensor(value).bfloat16().view(torch.int16).item() for value in (1.0, 2.0)]
assert products == {torch.float32: 2, torch.float16: 2, torch.bfloat16: bits[0] * bits[1]}, products
assert steps[1] == [k // 8 for k in range(N)] != steps[0], steps
EOF
TRITON_INTERPRET=1 venv/bin/python -W ignore finding.py
