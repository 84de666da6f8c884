"""Megatron in this process: one rank over gloo, behind the stand-in for CUDA where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.mcore.harness import Run, run


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`harness.run` with these arguments, once for all tests of this process: what others are compared with."""
    return cache(lambda *arguments, ranks=1: run(tmp_path_factory.mktemp("baseline"), *arguments, ranks=ranks))


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Parallel state of one rank, and seeded generators."""
    from megatron_lighthouse import cpu

    standing_in = cpu.install()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    rendezvous = tmp_path_factory.mktemp("rendezvous") / "store"
    backend = "gloo" if standing_in else "nccl"
    torch.distributed.init_process_group(backend, init_method=f"file://{rendezvous}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(11)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
