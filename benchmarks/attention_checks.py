"""Is the layer right on this GPU? Run before anything is timed: fresh random inputs, poisoned memory, float64 beside."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.kernels import lighthouse as kernels
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.lighthouse.steps import Steps
from megatron_lighthouse.softmax.backends import inner_attention

# N, L, p, k, m, B, H, G, D
SHAPES = [
    (12288, 3, 4, 256, 128, 2, 8, 8, 128),
    (8192, 3, 2, 128, 64, 1, 8, 2, 64),
    (1440, 3, 3, 32, 16, 2, 4, 2, 40),
    (16384, 4, 4, 128, 128, 1, 4, 4, 128),
    (8192, 5, 2, 128, 32, 1, 6, 2, 96),
    (8192, 3, 8, 64, 64, 1, 2, 2, 256),
    (32768, 3, 4, 1024, 1024, 1, 2, 1, 80),
    (163840, 2, 2, 1280, 1280, 1, 1, 1, 32),
]


QKV = tuple[Tensor, Tensor, Tensor]


def each(qkv: QKV, function: Callable[[Tensor], Tensor]) -> QKV:
    return function(qkv[0]), function(qkv[1]), function(qkv[2])


def poison() -> None:
    """Leave NaN in the memory that the next tensors get."""
    torch.full((2**28,), float("nan"), device="cuda")


def check() -> dict[str, object]:
    """Raises AssertionError where the kernels are wrong; answers what was found."""
    worst: dict[str, float] = {}
    for shape, dtype in product(SHAPES, (torch.bfloat16, torch.float16, torch.float32)):
        for name, error in _against_float64(shape, dtype).items():
            key = f"{str(dtype).removeprefix('torch.')} {name}"
            worst[key] = max(worst.get(key, 0.0), error)
    found: dict[str, object] = {
        "shapes x dtypes": len(SHAPES) * 3,
        "indices": "identical to the reference on GPU and CPU",
        "greatest relative error (norm) against float64": {name: float(f"{error:.3g}") for name, error in worst.items()},
        "bf16 against a dense bf16 attention on the gathered rows": _beside_dense(),
        "bit-identical over 100 repeats, forward and backward": _repeats(),
    }
    print("\n".join(f"{key}: {value}" for key, value in found.items()), flush=True)
    return found


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[QKV, Tensor]:
    n, *_, b, h, g, d = shape
    fused = torch.randn(n, b, g, h // g + 2, d, device="cuda").to(dtype)
    views = fused[:, :, :, : h // g].flatten(2, 3), fused[:, :, :, -2], fused[:, :, :, -1]
    return views, torch.randn(n, b, h, d, device="cuda").to(dtype)


def _against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, float]:
    n, levels, pooling, budget, tile_budget, *_ = shape
    geometry = LighthouseConfig(levels, pooling, budget, tile_budget).geometry(n)
    inputs, grad = _inputs(shape, dtype)
    query, key, _ = inputs
    scores = kernels.score(query, key, geometry)
    assert torch.equal(scores, reference.score(query, key, geometry)), shape
    assert torch.equal(scores.cpu(), reference.score(query.cpu(), key.cpu(), geometry)), shape
    for pin_first in (True, False):
        selection = kernels.select(scores, geometry, pin_first)
        assert torch.equal(selection.places, reference.select(scores, geometry, pin_first).places), shape
    got = _steps(kernels, inputs, grad, selection)
    exact = _steps(reference, each(inputs, torch.Tensor.double), grad.double(), selection)
    return {name: _distance(got[name], exact[name]) for name in got}


def _steps(steps: Steps, inputs: QKV, grad: Tensor, selection: Selection) -> dict[str, Tensor]:
    """The rows, an output made of all three of them, and the gradients."""
    leaves = each(inputs, lambda x: x.detach().requires_grad_())
    poison()
    rows = steps.gather(*leaves, selection)
    ratio = inputs[0].shape[2] // inputs[1].shape[2]
    mixed = rows[0] + 2 * rows[1].repeat_interleave(ratio, 2) + 3 * rows[2].repeat_interleave(ratio, 2)
    poison()
    out = steps.scatter(mixed, selection)
    grads = torch.autograd.grad(out, leaves, grad)
    names = ("rows q", "rows k", "rows v", "out", "dq", "dk", "dv")
    return {name: x.detach() for name, x in zip(names, (*rows, out, *grads), strict=True)}


def _distance(x: Tensor, exact: Tensor) -> float:
    assert torch.isfinite(x).all()
    return ((x.double() - exact).norm() / exact.norm()).item()


def _beside_dense() -> dict[str, float]:
    """Relative errors against float64: of our output, and of a dense bf16 attention on rows gathered in float64."""
    shape = (24576, 3, 4, 384, 128, 1, 8, 8, 128)
    config = LighthouseConfig(3, 4, 384)
    inputs, _ = _inputs(shape, torch.bfloat16)
    scores = kernels.score(inputs[0], inputs[1], config.geometry(shape[0]))
    selection = kernels.select(scores, config.geometry(shape[0]), True)
    exact_rows = reference.gather(*each(inputs, torch.Tensor.double), selection)
    exact = _attention64(*exact_rows)
    bf16 = each(exact_rows, torch.Tensor.bfloat16)
    dense = inner_attention("auto", bf16[0], bf16[1])(*bf16)
    # what the dense rows come to in the output: added exactly, then rounded to bf16 once
    scattered = reference.scatter(dense.double(), selection).bfloat16()
    exact_out = reference.scatter(exact, selection)
    ours = lighthouse_attention(*inputs, config, selection=selection)
    errors = {"dense, its rows": _distance(dense, exact), "dense, scattered": _distance(scattered, exact_out)}
    errors["lighthouse"] = _distance(ours, exact_out)
    assert errors["lighthouse"] <= 1.01 * errors["dense, scattered"], errors
    return {name: float(f"{error:.3g}") for name, error in errors.items()}


def _attention64(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention in float64, head by head: [S, 1, H, D]."""
    outs = []
    for h in range(query.shape[2]):
        logits = query[:, 0, h] @ key[:, 0, h].T / math.sqrt(query.shape[3])
        future = torch.ones_like(logits, dtype=torch.bool).triu_(1)
        outs.append(torch.softmax(logits.masked_fill_(future, -math.inf), -1) @ value[:, 0, h])
    return torch.stack(outs, 1).unsqueeze(1)


def _repeats() -> dict[str, str]:
    """The whole layer with deterministic algorithms asked of torch, 100 times."""
    shape = (16384, 3, 4, 256, 128, 1, 8, 2, 128)
    inputs, grad = _inputs(shape, torch.bfloat16)
    leaves = each(inputs, lambda x: x.detach().requires_grad_())
    config, found = LighthouseConfig(3, 4, 256), {}
    for name in ("auto", "fa4", "fa2"):
        torch.use_deterministic_algorithms(True)
        try:
            layer = config.replace(inner=name)
            results = []
            for _ in range(100):
                poison()
                out = lighthouse_attention(*leaves, layer)
                results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
            same = all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))
            assert same or name != "auto", "not deterministic"
            found[name] = "yes" if same else "no"
        except Exception as error:
            found[name] = f"not run ({str(error)[:120]})"
        finally:
            torch.use_deterministic_algorithms(False)
    return found
