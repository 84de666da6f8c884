"""RoPE by document: a model's rotary embedding gives each token the angle of its place in its document.

Megatron's own for packed rows wants lengths that 2·cp divides, reads them on the host in every layer, and takes one row. This
asks the embedding for all positions once a pass, and picks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

POSITIONS = "document_positions"
"""The attribute of a rotary embedding that holds those of the next pass."""


def rotate_by(model: Any, positions: Tensor) -> None:
    """Have a GPTModel rotate the tokens of its next pass by `positions`.

    Args:
        positions: [b, s/cp], int64, of this rank's tokens.
    """
    rotary: nn.Module | None = getattr(model, "rotary_pos_emb", None)
    if rotary is None:
        return
    if not hasattr(rotary, POSITIONS):
        rotary.register_forward_pre_hook(_ask_for_all, with_kwargs=True)
        rotary.register_forward_hook(_pick)
    setattr(rotary, POSITIONS, positions)


def _ask_for_all(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**named, "packed_seq": True}  # with which context-parallel ranks get all positions, not their own


def _pick(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """[s, 1, 1, d], which yarn returns with a factor -> [s/cp, b, 1, d]."""
    if isinstance(output, tuple):
        return _pick(module, args, output[0]), *output[1:]
    return output.squeeze(1)[getattr(module, POSITIONS).t()]
