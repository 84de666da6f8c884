"""How far results may lie from what they are held to: one table, a reason in each line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """|actual - expected| <= absolute + relative * |expected|, element by element."""

    absolute: float
    relative: float
    reason: str


TOLERANCES: dict[str, Tolerance] = {
    "parallel loss": Tolerance(1e-5, 0, "fp32 sums over ranks in another order, carried through three optimizer steps"),
    "parallel gradient norm": Tolerance(0, 3e-5, "as the loss: roundings of 6e-8, amplified by the scores; 2e-5 on one CPU"),
    "parallel half-life": Tolerance(0, 1e-5, "means of fp32 gates, of weights that lie as far apart as the losses"),
    "resumed step": Tolerance(2e-8, 5e-6, "an optimizer's step in fp32, and its gradient from moments that cancel to a tenth"),
    "ranks float64": Tolerance(1e-10, 0, "softmax merged from parts: some hundred roundings of 1.1e-16, with a wide margin"),
    "ranks float32": Tolerance(1e-5, 0, "softmax merged from parts: some hundred roundings of 6e-8, which mostly cancel"),
    "roundings": Tolerance(0.7, 0, "times the error of one: 1.57, for what is summed was rounded too; 1.81 with sums in bf16"),
    "converted logits": Tolerance(3e-6, 0, "fp32 logits up to 4, of the same weights: some ten roundings of 2.4e-7"),
    "golden": Tolerance(
        1e-5, 0, "the authors' kernels add fp32 rows by atomics; their rotated rows, in units of the greatest: angles are fp32"
    ),
    "float64": Tolerance(1e-12, 1e-12, "the same formula, summed in another order: some thousand roundings of 1.1e-16"),
    "turned rows": Tolerance(1e-10, 1e-10, "turned, then pooled, in place of pooled, then rotated: angles in float64"),
    "two decimals": Tolerance(5.1e-3, 0, "written in a table with two decimals: half of the last"),
    "adjoint float64": Tolerance(1e-9, 1e-9, "inner products of some thousand terms, which cancel"),
    "adjoint float32": Tolerance(1e-3, 1e-4, "inner products of some thousand rounded terms, which cancel"),
    "float32": Tolerance(5e-6, 5e-6, "the same formula in fewer bits: some hundred roundings of 6e-8"),
    "float16": Tolerance(4e-3, 4e-3, "rows, attention, result and their gradients keep 11 bits: 8 roundings of 4.9e-4"),
    "bfloat16": Tolerance(3e-2, 3e-2, "rows, attention, result and their gradients keep 8 bits: 8 roundings of 3.9e-3"),
}


def assert_close(actual: Tensor | ArrayLike, expected: Tensor | ArrayLike, kind: str) -> None:
    """Fails unless `actual` has the shape of `expected` and is within TOLERANCES[kind] of it. NaN never is."""
    limit = TOLERANCES[kind]
    torch.testing.assert_close(
        *(torch.as_tensor(x).detach().cpu().double() for x in (actual, expected)),
        atol=limit.absolute,
        rtol=limit.relative,
        msg=lambda text: f"not within {kind!r} ({limit.reason})\n{text}",
    )
