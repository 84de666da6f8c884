"""What context parallelism refuses, on every rank alike and before any collective; and a rank that fails alone."""

from __future__ import annotations

import multiprocessing
import re
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.schemes import comm_type_problem
from megatron_lighthouse.lighthouse.attention import lighthouse_select
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.options import in_flags
from megatron_lighthouse.softmax.blocks import Plain
from tests.context_parallel.shards import inputs_of, layer, shards_of
from tests.oracle import Problem
from tests.ranks import run_ranks
from tests.test_config import advice

thorough = settings(derandomize=True, max_examples=300)
FITS = Problem(64, 2, 2, 8, 2, groups=2, queries_per_group=2)
WORKED = "a collective: nothing was refused"


def config_of(problem: Problem, **options: Any) -> LighthouseConfig:
    return LighthouseConfig(**problem.options, **options)  # type: ignore[arg-type]


def silent(*args: Any, **kwargs: Any) -> None:
    raise ConnectionError(WORKED)


def answers(
    group: dist.ProcessGroup, inputs: Sequence[Tensor], config: LighthouseConfig, comm_type: str, selection: Selection | None
) -> list[str]:
    """What the layer and its selection say on this rank, when nobody is let through to another rank."""
    query, key, value, *_ = shards_of(group, inputs)
    said = []
    with mock.patch.multiple(Exchange, all_gather=silent, all_to_all=silent, start=silent):
        try:
            lighthouse_attention(query, key, value, config, cp_group=group, cp_comm_type=comm_type, selection=selection)
        except (ValueError, ConnectionError) as error:
            said.append(str(error))
        try:
            lighthouse_select(query, key, config, value=value, cp_group=group)
            said.append(WORKED)
        except (ValueError, ConnectionError) as error:
            said.append(str(error))
    return said


def refusal(
    size: int, problem: Problem, comm_type: str = "p2p", selection: Selection | None = None, **options: Any
) -> tuple[str, str]:
    """What the layer and its selection say, all ranks alike."""
    said = run_ranks(size, answers, inputs_of(problem), config_of(problem, **options), comm_type, selection)
    assert all(other == said[0] for other in said)
    layer_says, selection_says = said[0]
    return in_flags(layer_says), in_flags(selection_says)


def refusal_of(config: LighthouseConfig, seq_length: int, size: int) -> str:
    """What the sizes are refused with; "" where they fit."""
    try:
        config.geometry(seq_length, size)
    except ValueError as error:
        return in_flags(str(error))
    return ""


def offers(text: str) -> list[dict[str, int]]:
    """The numbers that a message offers; "a budget that is a multiple of 8" is a rule and not a number."""
    return advice(text.split(", or a budget that is a multiple of ")[0]) if text else []


def fits(problem: Problem, size: int, offer: dict[str, int]) -> bool:
    changed = {"seq_length": problem.seq_length, "context_parallel_size": size, **problem.options} | offer
    seq_length, size = int(changed.pop("seq_length")), int(changed.pop("context_parallel_size"))
    return not refusal_of(LighthouseConfig(**changed), seq_length, size)  # type: ignore[arg-type]


@st.composite
def _sizes(draw: st.DrawFn) -> Problem:
    levels, pooling = draw(st.sampled_from([(2, 2), (2, 3), (3, 2), (2, 4)]))
    tiles, tile_budget = draw(st.integers(1, 4)), draw(st.sampled_from([2, 4, 6]))
    windows = tiles * (tile_budget + draw(st.integers(0, 8)))
    return Problem(windows * pooling ** (levels - 1), levels, pooling, tiles * tile_budget, tile_budget)


SIZES = _sizes()


@pytest.mark.parametrize(
    ("size", "problem", "rule"),
    [
        pytest.param(
            4,
            Problem(80, 3, 2, 4, 2),
            "--context-parallel-size 4 cuts the sequence into 8 chunks of whole windows of 4 tokens, so --seq-length 80 must "
            "be a multiple of 32: use --seq-length 64 or 96, or --context-parallel-size ",
            id="chunks of half a window",
        ),
        pytest.param(
            8,
            Problem(64, 2, 2, 4, 2),
            "--context-parallel-size 8 deals the gathered rows into 16 equal chunks, and --lighthouse-levels 2 with "
            "--lighthouse-pooling 2 and --lighthouse-budget 4 refines into 8 rows, no multiple of it: use "
            "--lighthouse-budget 8 or 16, or --context-parallel-size 2 or 4",
            id="rows that cannot be dealt evenly",
        ),
        pytest.param(
            2,
            Problem(24, 2, 2, 10, 2),
            "--seq-length 24 must be a multiple of 10 (budget 10 / tile budget 2 = 5 tiles of whole windows of 2 tokens): use "
            "--lighthouse-budget 8 or 12, or --seq-length 40.",
            id="tiles of half a window",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_on_every_rank_alike(size: int, problem: Problem, rule: str) -> None:
    said = refusal(size, problem)
    assert said[0] == said[1]
    assert said[0].startswith(rule)
    assert offers(said[0])


@thorough
@given(sizes=SIZES, size=st.integers(2, 8))
def test_sizes_either_fit_or_are_refused_with_advice_that_works(sizes: Problem, size: int) -> None:
    config = config_of(sizes)
    whole_chunks = sizes.seq_length % (2 * size * sizes.window) == 0
    assume(whole_chunks or (sizes.levels - 1) * sizes.pooling * sizes.budget % (2 * size) == 0)  # else see below
    message = refusal_of(config, sizes.seq_length, size)
    assert [offer for offer in offers(message) if not fits(sizes, size, offer)] == []
    if not message:
        assert whole_chunks
        assert config.geometry(sizes.seq_length, size).gathered_length % (2 * size) == 0


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        pytest.param(4, Problem(36, 2, 3, 2, 2), id="no sequence makes the rows a multiple of the chunks"),
        pytest.param(2, Problem(72, 3, 2, 10, 2), id="a whole number of tiles, but not of chunks"),
    ],
)
def test_advice_on_the_sequence_length_satisfies_every_rule(size: int, sizes: Problem) -> None:
    message = refusal_of(config_of(sizes), sizes.seq_length, size)
    assert [offer for offer in offers(message) if not fits(sizes, size, offer)] == []


@pytest.mark.parametrize("scorer", ["dilated", "gla"])
def test_chunks_of_half_a_stream_are_refused_by_the_scorers_that_take_every_fourth_token(scorer: str) -> None:
    problem = Problem(48, 2, 2, 8, 8)
    layer_says, selection_says = refusal(4, problem, scorer=scorer)
    assert layer_says == selection_says
    assert layer_says.startswith(f"--seq-length 48 must be a multiple of 32 for --lighthouse-scorer {scorer}")
    for offer in offers(layer_says):
        changed = Problem(offer["seq_length"], 2, 2, 8, 8)
        assert refusal(4, changed, scorer=scorer) == (WORKED, WORKED)


@pytest.mark.parametrize("comm_type", ["a2a+p2p", "allgather", ""])
def test_an_unknown_scheme_is_refused(comm_type: str) -> None:
    said, _ = refusal(2, FITS, comm_type)
    assert said.startswith(f"--cp-comm-type {comm_type} ")
    for offer in ("p2p", "all_gather", "a2a"):
        assert offer in said
        assert refusal(2, FITS, offer)[0] == WORKED


def test_heads_that_do_not_divide_among_ranks_are_refused_by_a2a_alone() -> None:
    said, _ = refusal(4, FITS, "a2a")
    assert said == (
        "--cp-comm-type a2a shares out the 4 query and 2 key/value heads of a tensor-parallel rank among "
        "--context-parallel-size 4, which must divide both: use --cp-comm-type p2p, or --context-parallel-size 2."
    )
    assert refusal(2, FITS, "a2a")[0] == WORKED
    assert refusal(4, FITS, "p2p")[0] == WORKED


@given(st.integers(1, 12), st.integers(1, 6), st.integers(2, 16))
def test_context_parallel_sizes_that_a2a_offers_work(groups: int, ratio: int, size: int) -> None:
    problem = comm_type_problem("a2a", groups * ratio, groups, size)
    assert (problem is None) == (groups % size == 0)
    for offer in offers(in_flags(problem or "")):
        if "context_parallel_size" in offer:
            assert comm_type_problem("a2a", groups * ratio, groups, offer["context_parallel_size"]) is None


def test_a_forced_backend_that_is_not_there_is_refused_before_any_collective() -> None:
    for comm_type in ("p2p", "all_gather", "a2a"):
        said, _ = refusal(2, FITS, comm_type, inner="fa3")
        assert said.startswith("--lighthouse-inner fa3 cannot run: FlashAttention 3 does not run on this device.")
        assert said.endswith("use --lighthouse-inner auto or sdpa.")
    for offer in ("auto", "sdpa"):
        assert refusal(2, FITS, inner=offer)[0] == WORKED


def test_a_given_selection_is_refused() -> None:
    config = config_of(FITS)
    geometry = config.geometry(FITS.seq_length)
    selection = Selection(geometry, torch.zeros(1, 2, geometry.pyramid_length, dtype=torch.int32), geometry.gathered_length)
    said, _ = refusal(2, FITS, selection=selection)
    assert said == "a selection can be given without context parallelism alone: leave out `selection` or `cp_group`."


def test_ranks_work_on_after_a_refusal() -> None:
    refusal(2, FITS, "a2a+p2p")
    first = run_ranks(2, layer, inputs_of(FITS), config_of(FITS))
    assert all(x.isfinite().all() for tensors in first for x in tensors)


TIMEOUT = 3
LINGERS = 60


def fail_alone(rank: int, size: int, folder: Path, problem: Problem, how: str) -> None:
    """One rank of a job in which the last one fails; the others' collectives give up after TIMEOUT seconds."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    group: Any = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    fails = rank == size - 1
    try:
        query, key, value, _ = shards_of(group, inputs_of(problem))
        key = key[:-1] if fails and how == "a wrong shape" else key
        if fails and how != "a wrong shape":
            mock.patch.object(Plain, "forward", run_out_of_memory).start()
        lighthouse_attention(query, key, value, config_of(problem), cp_group=group)
        (folder / f"{rank}").write_text("no error")
    except Exception:
        (folder / f"{rank}").write_text(traceback.format_exc())
        if fails and how == "an error, and lingers":
            time.sleep(LINGERS)
        raise SystemExit(1) from None


def run_out_of_memory(*args: Any) -> Any:
    raise MemoryError("on one rank")


@pytest.mark.parametrize(
    ("how", "tile_budget"),
    [("a wrong shape", 2), ("a wrong shape", 8), ("an error", 2), ("an error", 8), ("an error, and lingers", 2)],
    ids=str,
)
def test_a_rank_that_fails_alone_ends_the_others(how: str, tile_budget: int, tmp_path: Path) -> None:
    size, problem = 2, Problem(64, 2, 2, 8, tile_budget)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=fail_alone, args=(r, size, tmp_path, problem, how)) for r in range(size)]
    deadline = time.monotonic() + 30
    for process in processes:
        process.start()
    ends = processes[:-1] if how == "an error, and lingers" else processes
    try:
        for process in ends:
            process.join(max(0.0, deadline - time.monotonic()))
        assert [process.exitcode for process in ends] == [1] * len(ends)  # None: it hangs
    finally:
        for process in processes:
            process.kill()
    error = "expected query .* of one shape" if how == "a wrong shape" else "MemoryError: on one rank"
    assert re.search(error, (tmp_path / f"{size - 1}").read_text())
    for rank in range(size - 1):
        assert "no error" not in (tmp_path / f"{rank}").read_text()
