"""What an iteration that is left out reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


@pytest.mark.parametrize("stages", [0, 1, 2], ids=["no data", "a stage", "two virtual stages"])
def test_each_stage_reads_its_micro_batches_and_deals_none_out(
    stages: int, megatron: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_lighthouse.mcore.loop import skip

    runs = iter([True, False])
    machine = SimpleNamespace(should_run_forward_backward=lambda data: next(runs))
    monkeypatch.setattr(skip, "get_rerun_state_machine", lambda: machine)
    monkeypatch.setattr(skip, "get_num_microbatches", lambda: 3)
    found = [iter(range(10)) for _ in range(stages)]
    data: Any = found if stages == 2 else found[0] if found else None
    skip.skip_step(lambda _: pytest.fail("Megatron's was called"), data)
    assert [next(one) for one in found] == [3] * stages
    assert next(runs, None) is None
