"""Second and forward derivatives and torch.func: refused in our own words, never zero in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._decomp.decompositions_for_jvp  # scripts torch's functions: before a test has some of them stand in for CUDA's
from torch import Tensor
from torch.autograd import forward_ad, functional

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.lighthouse.attention import lighthouse_select

IMPLEMENTATIONS = ["reference", "kernels"]


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(32, 1, heads, 8, generator=generator) for heads in (4, 2, 2)]


def attend(steps: str) -> Callable[..., Tensor]:
    config = LighthouseConfig(levels=2, pooling=2, budget=8, tile_budget=8, steps=steps)
    return lambda q, k, v: lighthouse_attention(q, k, v, config)


def gradient(run: Callable[..., Tensor], given: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run(*given).square().sum(), [x for x in given if x.requires_grad], **options)


EVERY = (0, 1, 2)


@pytest.mark.parametrize(
    ("steps", "learns"), [("kernels", EVERY), *(("reference", learns) for learns in (EVERY, (0,), (1,), (2,)))]
)
def test_a_second_derivative(steps: str, learns: tuple[int, ...]) -> None:
    given = [x.requires_grad_(i in learns) for i, x in enumerate(inputs())]
    first = gradient(attend(steps), given, create_graph=True)
    for once, again in zip(gradient(attend(steps), given), first, strict=True):
        assert torch.equal(once, again)
    wanted = [x for x in given if x.requires_grad]
    squares = sum(x.square().sum() for x in first)
    for allow_unused in (False, True):
        with pytest.raises(RuntimeError, match="lighthouse_attention is differentiable once"):
            torch.autograd.grad(squares, wanted, allow_unused=allow_unused, retain_graph=True)
    with pytest.raises(RuntimeError, match="lighthouse_attention is differentiable once"):
        squares.backward()


def test_a_product_with_the_hessian_is_not_zero_in_silence() -> None:
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match="lighthouse_attention is differentiable once"):
        functional.hvp(lambda x: attend("reference")(x, k, v).square().sum(), q, torch.ones_like(q))


def test_a_graph_of_the_gradient_that_nobody_differentiates_is_no_fault() -> None:
    given = [x.requires_grad_() for x in inputs()]
    scale = torch.ones((), requires_grad=True)
    (attend("reference")(*given).sum() * scale).backward(create_graph=True)
    assert all(x.grad is not None for x in (*given, scale))


@pytest.mark.parametrize("steps", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["vmap", "grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian"])
def test_transforms_of_torch_func(name: str, steps: str) -> None:
    q, k, v = inputs()
    run = attend(steps)
    calls: dict[str, Callable[[], Any]] = {
        "vmap": lambda: torch.func.vmap(run)(*(x[None].expand(2, *x.shape) for x in (q, k, v))),
        "vjp": lambda: torch.func.vjp(run, q, k, v),
        "jvp": lambda: torch.func.jvp(run, (q, k, v), (q, k, v)),
    }
    if name not in calls:
        calls[name] = lambda: getattr(torch.func, name)(lambda x: run(x, k, v).sum())(q)
    with pytest.raises(RuntimeError, match=r"lighthouse_attention runs under no transform of torch.func"):
        calls[name]()


def test_the_selection_under_vmap() -> None:
    config = LighthouseConfig(levels=2, pooling=2, budget=8, tile_budget=8)
    q, k, _ = inputs()
    with pytest.raises(RuntimeError, match=r"under no transform of torch\.func"):
        torch.func.vmap(lambda x: lighthouse_select(x, k, config))(q[None])


@pytest.mark.parametrize("at", [0, 1, 2])
def test_forward_mode(at: int) -> None:
    given = inputs()
    with forward_ad.dual_level():
        attend("reference")(*given)  # without a tangent nothing is asked for
        given[at] = forward_ad.make_dual(given[at], torch.ones_like(given[at]))
        with pytest.raises(RuntimeError, match="lighthouse_attention has no forward-mode derivative"):
            attend("reference")(*given)


def test_what_backward_keeps_is_not_the_inputs() -> None:
    """The path by which a second derivative is found does not hold Q, K and V."""
    given = [x.requires_grad_() for x in inputs()]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.untyped_storage().data_ptr()) or x, lambda x: x):
        attend("reference")(*given)
    assert not {x.untyped_storage().data_ptr() for x in given} & set(kept)
