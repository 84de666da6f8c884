"""The longest context of a model on given GPUs: what is recommended fits with room, and what is longer does not."""

from __future__ import annotations

import re

import pytest

from megatron_lighthouse.launch.fits import enough_memory
from megatron_lighthouse.lighthouse.by_length import NAMES, by_length
from megatron_lighthouse.mcore.command_line.tiles import mlp_tile_tokens
from megatron_lighthouse.plan import lengths, longest, memory, search
from megatron_lighthouse.plan.__main__ import main
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.models import run_of_model
from megatron_lighthouse.plan.run import Run, run_of


@pytest.fixture
def qwen() -> Run:
    return run_of_model("qwen3-0.6b", 2**17, device=DEVICES["h200"])


def test_each_way_reaches_further_than_the_one_before(qwen: Run) -> None:
    found = []
    for way in longest.layouts(qwen):
        one = lengths.of_run(way, (), memory.fits)
        assert one is not None
        assert memory.fits(one.check())
        assert not memory.fits(lengths.at(one, one.seq_length + 2**16))
        found.append(one.seq_length)
    assert len(found) == 4
    assert found == sorted(set(found))
    assert found[-1] > 2**20


def test_a_budget_that_is_given_stays(qwen: Run) -> None:
    full = qwen.change(recompute="full")
    own = lengths.of_run(full, NAMES, memory.fits)
    assert own is not None
    assert own.config == full.config
    assert own.seq_length > 2**17
    much = lengths.of_run(full.change(config=full.config.replace(budget=2**15)), NAMES, memory.fits)
    assert much is not None  # though lengths below 524,288 are too short for it
    assert 2**19 <= much.seq_length <= own.seq_length


def test_levels_alone_that_are_given_take_each_lengths_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the table, not that of the length from which the search sets out."""
    command = "--model qwen3-0.6b --gpus 1 --device h200 --recompute full --longest --lighthouse-levels".split()
    assert main([*command, "4"]) == 0
    said = capsys.readouterr().out
    tokens = int(re.search(r"--seq-length (\d+)", said)[1])  # type: ignore[index]
    assert f"(L=4 p=4 k={by_length(tokens, 4, levels=4)['budget']})" in said
    assert main([*command, "3"]) == 0
    assert "(L=3 " in capsys.readouterr().out


def test_the_answer_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    command = "--model qwen3-0.6b --gpus 1 --device h200 --lighthouse-dense-first 0 --lighthouse-dense-last 0 --longest"
    assert main(command.split()) == 0
    said = capsys.readouterr().out
    tokens = int(re.search(r"--seq-length (\d+)", said)[1])  # type: ignore[index]
    assert f"{tokens:,} tokens [predicted" in said
    assert "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --mlp-tile-tokens 65536" in said
    assert tokens > 2**20
    assert main([*command.split(), "--recompute", "mlp"]) == 0
    assert int(re.search(r"--seq-length (\d+)", capsys.readouterr().out)[1]) < 2**19  # type: ignore[index]
    assert main("--model llama3-8b --gpus 1 --device h100 --longest".split()) == 2
    assert "--gpus 1: no length of this model fits: use more GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "beside",
    [
        *(
            "--tokens 20B",
            "--seq-length 32K",
            "--stage1-fraction 0.7",
            "--stage1-fraction 0",
            "--global-batch-size 8",
            "--details",
        ),
        "--document-lengths lengths.txt",
    ],
)
def test_what_means_nothing_beside_it_is_refused(beside: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "qwen3-0.6b", "--gpus", "1", "--longest", *beside.split()]) == 2
    assert f"leave {beside.split()[0]} out, or --longest" in capsys.readouterr().err


def test_a_layout_that_is_given_is_kept_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = "--model llama3-8b --gpus 8 --device h200 --longest --recompute full --context-parallel-size".split()
    assert main([*command, "8", "--cp-comm-type", "all_gather"]) == 0
    assert "--cp-comm-type all_gather" in capsys.readouterr().out
    assert main([*command, "3"]) == 2
    assert "no layout that shares one sequence among them has" in capsys.readouterr().err


def test_ranks_share_one_sequence(qwen: Run) -> None:
    found = list(longest.layouts(qwen.change(gpus=4)))
    assert found
    assert {run.data_parallel for run in found} == {1}


@pytest.mark.parametrize(("ffn", "tokens"), [(3072, 2**16), (12288, 2**14), (1536, 2**17), (2**40, 1)])
def test_a_tile_holds_three_gibibytes(ffn: int, tokens: int) -> None:
    assert mlp_tile_tokens(ffn) == tokens


def test_tiles_are_ranked_and_offered() -> None:
    """Where nothing else fits one GPU."""
    run = run_of("530m-98k", gpus=1, global_batch=1, seq_length=98304 * 15, device=DEVICES["h200"], recompute="full")
    assert not memory.fits(run)
    best = next(way for way in search.ways(run) if memory.fits(way))
    assert best.mlp_tile_tokens == 2**17
    assert next(enough_memory(run)).endswith("--recompute-num-layers 1 --mlp-tile-tokens 131072")
