"""Times of Lighthouse's layer as another checkout builds it, in a process of its own: what `--against` asks for.

Imports of the package no more than `attention_cases` does: other builds have other insides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from attention_cases import Case
from measure import median_ms
from torch import Tensor

DIRECTIONS = ("fwd", "fwd+bwd")


def times(case: Case, checkout: Path) -> dict[str, float | None]:
    """Milliseconds by direction; None where that build cannot run it, and the end of why is printed."""
    path = [str(checkout.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, str(Path(__file__)), json.dumps(asdict(case))]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"{checkout}: {done.stderr[-300:]}")
        return dict.fromkeys(DIRECTIONS)
    found: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    from megatron_lighthouse import lighthouse_attention  # of the other checkout, which PYTHONPATH names first

    case = Case(**json.loads(sys.argv[1]))
    sets = [case.inputs() for _ in range(2)]

    def layer(qkv: tuple[Tensor, ...]) -> Tensor:
        query, key, value = qkv
        return lighthouse_attention(query, key, value, case.config)

    grad = torch.randn_like(layer(sets[0]))
    calls = {"fwd": layer, "fwd+bwd": lambda qkv: torch.autograd.grad(layer(qkv), qkv, grad)}
    print(json.dumps({direction: median_ms([partial(calls[direction], qkv) for qkv in sets]) for direction in DIRECTIONS}))


if __name__ == "__main__":
    main()
