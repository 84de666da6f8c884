"""What the plan says, held to Megatron's own functions: the loss's memory, and the refusals of a run."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch.profiler import ProfilerActivity, profile

from megatron_lighthouse.mcore.command_line import checks
from megatron_lighthouse.plan import memory
from megatron_lighthouse.plan.run import run_of
from tests.mcore.test_spec import transformer_config


def test_in_the_words_of_the_run() -> None:
    """Of the same model, by the same functions."""
    run = run_of("530m-98k", options={"qk_layernorm": True}, seq_length=98305)
    config = transformer_config(num_layers=30, num_attention_heads=8, num_query_groups=8, qk_layernorm=True, hidden_size=1024)
    with pytest.raises(ValueError, match="cannot run as asked") as theirs:
        checks.check(config, run.settings, 98305)
    with pytest.raises(ValueError, match="--qk-layernorm") as ours:
        run.check()
    assert str(theirs.value).splitlines()[1:] == [f"  - {line}" for line in str(ours.value).splitlines()]


def test_without_fusion_megatron_makes_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the peak, forward and backward, of its own function in bf16: 2 + 4 bytes a logit."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    tokens, rows = 256, 4096
    weight = torch.randn(rows, 8, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.randn(tokens, 1, 8, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        loss = vocab_parallel_cross_entropy(hidden @ weight.T, torch.randint(rows, (tokens, 1)), tp_group=_One())
        loss.sum().backward()
    events = sorted((e.start_ns(), e.nbytes()) for e in found.profiler.kineto_results.events() if e.name() == "[memory]")
    now = peak = 0
    for _, size in events:
        now += size
        peak = max(peak, now)
    assert peak / (tokens * rows) == pytest.approx(memory.LOSS[False], rel=0.05)


class _One:
    """A group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1
