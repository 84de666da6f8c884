"""A million tokens: a few queries over all keys before them, with pieces and chunks as in training."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Mask
from megatron_lighthouse.wall import decay, reference
from megatron_lighthouse.wall.blocks import Attention
from megatron_lighthouse.wall.cut import Cut
from megatron_lighthouse.wall.decay import Decays
from megatron_lighthouse.wall.diagonal import Diagonal
from megatron_lighthouse.wall.earlier import Plain
from megatron_lighthouse.wall.near import Near
from megatron_lighthouse.wall.pieces import Sight, first_rows
from megatron_lighthouse.wall.travel import Call, Decayed
from megatron_lighthouse.wall.within import Within

CHUNKS, ROWS = 16, 2
CHUNK = (1 << 20) // CHUNKS


def by_formula(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp, and the gradient of the keys' gates, of the last ROWS tokens over those before."""
    count = len(k) - ROWS
    outs, lses, of_gates = [], [], torch.zeros(count, k.shape[-1], dtype=torch.float64)
    for i in range(ROWS):
        after = gate[1 : count + i + 1].flip(0).cumsum(0).flip(0)[:count]  # from a key's next gate to the row's own
        faded = k[:count] * after.exp()
        logits = faded @ q[i]
        lse = logits.logsumexp(0)
        weights = (logits - lse).exp()
        out = weights @ v[:count]
        change = weights * (v[:count] @ grad[i] - grad[i] @ out)
        pairs = change.unsqueeze(1) * faded * q[i]
        of_gates[1:] += pairs.cumsum(0)[:-1]
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses), of_gates


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_the_last_of_a_million_tokens(dtype: torch.dtype, most: float) -> None:
    """In float32 no weight depends on how far from the sequence's start it stands."""
    generator = torch.Generator().manual_seed(3)
    tokens, seen = CHUNKS * CHUNK, (CHUNKS - 1) * CHUNK
    rows = (ROWS, tokens, tokens, tokens, ROWS)
    q, k, v, gate, grad = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in rows)
    gate = -gate.abs() * torch.tensor([1e-6, 1e-5, 0.1])
    key, value, gates = (x.to(dtype).view(-1, 1, 1, 3).requires_grad_() for x in (k, v, gate))
    near = torch.zeros(CHUNK, 1, 1, 3, dtype=dtype)
    near[:ROWS, 0, 0] = q.to(dtype)
    cut, sight, call = Cut(CHUNK, 4096), Sight((0, seen + ROWS, tokens)), Call()
    first = first_rows(cut, sight, (15,), near.device)
    decays, within = cast(Decays, decay), Within(cast(Decays, decay), Plain(1.0), CHUNK, 4096, sight)
    block = Attention(cast(Diagonal, reference), decays, Plain(1.0), 1.0, cut, within, sight, first, call=call)
    (decayed,) = Decayed.apply(call, cast(Decays, decay), cut.pieces(range(CHUNKS)), None, key, gates)
    given = Near(near, near, *(x[seen:].detach() for x in (value, gates))).tensors
    far, mask = (decayed[:seen].detach(), value[:seen].detach()), Mask((15,), tuple(range(15)))
    part = block.forward(given, far, mask)
    expected = by_formula(q, k[: seen + ROWS], v, gate, grad)
    out = part.averages[0][:ROWS, 0, 0].double()
    assert (out - expected[0]).abs().max() < most
    assert (part.lse[0, 0, :ROWS].double() - expected[1]).abs().max() < most
    of_rows = torch.zeros_like(near)
    of_rows[:ROWS, 0, 0] = grad.to(dtype)
    _, (of_key, _) = block.backward(of_rows, given, far, part, mask)
    (of_gate,) = torch.autograd.grad(decayed, gates, torch.cat([of_key, torch.zeros_like(near)]))
    assert (of_gate[:seen, 0, 0].double() - expected[2]).norm() / expected[2].norm() < most * 10
