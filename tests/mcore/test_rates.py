"""Groups of parameters that go on with their moments and take other rates."""

from __future__ import annotations

from typing import Any

import torch

from megatron_lighthouse.mcore.loop.rates import place, share_rates


def test_rates_are_where_adam_reads_them() -> None:
    """A checkpoint has them as the run had them that saved it, tensors on the CPU."""

    def groups(rate: Any, **more: Any) -> list[dict[str, Any]]:
        return [{"params": [torch.empty(1, device="meta")], "lr": rate, **more}, {"params": [], "lr": rate, **more}]

    for saved in (0.25, torch.tensor(0.25)):
        eager, captured = groups(saved, step=torch.tensor([7])), groups(saved)
        place(eager, captured=False)
        place(captured, captured=True)
        assert [(group["lr"], group["step"]) for group in eager] == [(0.25, 7)] * 2
        assert {type(group["lr"]) for group in eager} == {float}
        assert [group["lr"].device.type for group in captured] == ["meta", "cpu"]
        assert captured[1]["lr"] == 0.25
        assert captured[1]["lr"].dtype == torch.float32


def test_groups_that_differ_in_their_rates_alone() -> None:
    """Of two pairs of muP's, and one that the other side does not have."""

    def groups(*rates: float) -> list[dict[str, Any]]:
        return [{"wd_mult": 1.0, "max_lr": rate, "min_lr": rate / 10} for rate in rates]

    saved, bias = groups(1.0, 0.25), {"pre_wd_mult": 0.0, "max_lr": 1.0, "min_lr": 0.1}
    share_rates([*groups(0.5, 2.0), {"wd_mult": 0.0, "max_lr": 3.0, "min_lr": 0.0}], [*saved, bias])
    assert [group["max_lr"] for group in saved] == [2.0, 0.5]
    assert [group["min_lr"] for group in saved] == [0.2, 0.05]
    assert (bias["max_lr"], bias["min_lr"]) == (3.0, 0.0)
    share_rates(groups(7.0), saved)
    assert [group["max_lr"] for group in saved] == [2.0, 0.5]
