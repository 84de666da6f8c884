"""A small GPT in plain PyTorch with normed queries and keys, as Qwen3 has them, and text that any Python has: for `capture`."""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lighthouse.lighthouse.rotary import Rotary

LAYERS, WIDTH, HEADS, GROUPS, DIM = 4, 128, 4, 2, 32
TOKENS, BASE = 1024, 10000.0
WARMUP, RATE = 50, 3e-3
PARTS = ("train", "choice", "test")
"""Of the files of Python's library: one of sixteen is in each of the last two."""


def rotary() -> Rotary:
    """By which the model rotates queries and keys."""
    return Rotary(BASE ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM))


class Block(nn.Module):
    """Attention with grouped queries, normed head by head before RoPE, and a gated MLP."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * GROUPS) * DIM, bias=False)
        self.norms = nn.ModuleList([nn.RMSNorm(DIM) if normed else nn.Identity() for _ in range(2)])
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 6 * WIDTH, bias=False), nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def projected(self, x: Tensor, turn: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [N, B, H, D] and keys, and values [N, B, G, D], of x [N, B, WIDTH]."""
        rows = self.qkv(self.before(x)).unflatten(-1, (-1, DIM))
        query, key, value = rows.split([HEADS, GROUPS, GROUPS], 2)
        query, key = (norm(x) for norm, x in zip(self.norms, (query, key), strict=True))
        positions = torch.arange(len(x))
        query, key = (turn.turn(x.unsqueeze(0), positions)[0] for x in (query, key))
        return query, key, value

    def forward(self, x: Tensor, turn: Rotary) -> Tensor:
        """[N, B, WIDTH] -> the same."""
        query, key, value = (y.permute(1, 2, 0, 3) for y in self.projected(x, turn))
        rows = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.out(rows.permute(2, 0, 1, 3).flatten(2))
        gate, up = self.up(self.between(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


class Model(nn.Module):
    """Bytes in, logits of the next byte out: [N, B] -> [N, B, 256]."""

    blocks: Any

    def __init__(self, normed: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList([Block(normed) for _ in range(LAYERS)])
        self.last = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        self.turn = rotary()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.turn)
        logits: Tensor = self.head(self.last(x))
        return logits

    @torch.no_grad()
    def layers(self, tokens: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values of each layer, as core attention sees them."""
        x, found = self.embedding(tokens), []
        for block in self.blocks:
            found.append(block.projected(x, self.turn))
            x = block(x, self.turn)
        return found


def text(part: str) -> Tensor:
    """[n] bytes: the files of Python's library that are of a part of `PARTS`, in the order of their paths."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    of = [PARTS[{3: 1, 11: 2}.get(i % 16, 0)] for i in range(len(paths))]
    chosen = [path.read_bytes() for path, one in zip(paths, of, strict=True) if one == part]
    return torch.frombuffer(bytearray(b"\n".join(chosen)), dtype=torch.uint8).long()


def rows(part: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[TOKENS + 1, count] tokens from anywhere in a text."""
    starts = torch.randint(len(part) - TOKENS - 1, (count,), generator=generator)
    return torch.stack([part[start : start + TOKENS + 1] for start in starts.tolist()], 1)


def loss(model: Model, drawn: Tensor) -> Tensor:
    """Nats a byte."""
    return nn.functional.cross_entropy(model(drawn[:-1]).flatten(0, 1), drawn[1:].flatten())


def trained(steps: int, batch: int, seed: int, normed: bool = True) -> Model:
    """A model after so many steps of Adam, with dense attention."""
    torch.manual_seed(seed)
    model, words, generator = Model(normed), text("train"), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        rate = RATE * min(1, (step + 1) / WARMUP) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        value = loss(model, rows(words, batch, generator))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {value.item():.3f}", flush=True)
    return model
