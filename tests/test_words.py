"""Errors in the caller's words: the library names its arguments, the command line its flags."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, Rotary, lighthouse_attention, lighthouse_select
from megatron_lighthouse.context_parallel.schemes import comm_type_problem
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.mcore.command_line import checks, settings
from megatron_lighthouse.options import in_flags
from megatron_lighthouse.parallax.attention import parallax_attention
from megatron_lighthouse.softmax.backends import choose_for_blocks
from megatron_lighthouse.softmax.rows import RowKind

SMALL = {"levels": 2, "pooling": 4, "budget": 8, "tile_budget": 4}


def attend(tokens: int = 64, cp_comm_type: str = "p2p", **options: object) -> Tensor:
    x = torch.zeros(tokens, 1, 2, 8)
    return lighthouse_attention(x, x, x, LighthouseConfig(**{**SMALL, **options}), cp_comm_type=cp_comm_type)  # type: ignore[arg-type]


def stated(problem: str | None) -> None:
    raise ValueError(problem)


REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "levels": (lambda: LighthouseConfig(levels=1), "config.levels 1"),
    "pooling": (lambda: LighthouseConfig(pooling=1), "config.pooling 1"),
    "tile budget": (lambda: LighthouseConfig(tile_budget=3), "config.tile_budget 3"),
    "budget": (lambda: LighthouseConfig(budget=200), "config.budget 200"),
    "type": (lambda: LighthouseConfig(budget=True), "config.budget True"),
    "scorer": (lambda: LighthouseConfig(scorer="vibes"), "config.scorer 'vibes'"),
    "length": (lambda: attend(60), "query's N 60"),
    "short": (lambda: attend(16), "config.budget 8"),
    "ranks": (lambda: LighthouseConfig(**SMALL).geometry(80, 4), "cp_group.size() 4"),  # type: ignore[arg-type]
    "scheme": (lambda: attend(cp_comm_type="ring"), "cp_comm_type ring"),
    "scheme of Transformer Engine": (lambda: attend(cp_comm_type="a2a+p2p"), "cp_comm_type a2a+p2p"),
    "heads": (lambda: stated(comm_type_problem("a2a", 4, 2, 4)), "cp_comm_type a2a"),
    "inner": (lambda: attend(inner="fa3"), "config.inner fa3"),
    "inner of Transformer Engine": (lambda: attend(inner="te"), "config.inner te"),
    "inner over ranks": (
        lambda: choose_for_blocks("fa3", ["sdpa"], RowKind(torch.device("cpu"), torch.float32, 1, 1, 8, 8)),
        "config.inner fa3",
    ),
    "steps": (lambda: attend(steps="kernels"), "config.steps kernels"),
    "stride": (lambda: stated(SCORERS["dilated"].problem(90, 1)), "query's N 90"),
    "values": (
        lambda: lighthouse_select(*[torch.zeros(64, 1, 2, 8)] * 2, LighthouseConfig(**SMALL, scorer="summary")),  # type: ignore[arg-type]
        "config.scorer summary",
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_the_library_names_arguments(refusal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call, starts = REFUSALS[refusal]
    with pytest.raises(ValueError, match="^" + re.escape(starts)) as refused:
        call()
    assert not re.search(r"--[a-z]", str(refused.value))
    in_words_of_a_command = in_flags(str(refused.value))
    assert in_words_of_a_command.startswith("--")
    assert not re.search(r"config\.|cp_group|query's N|cp_comm_type", in_words_of_a_command)


ROW: Any = torch.zeros(64, 1, 2, 8)
SETTINGS = LighthouseConfig(**SMALL)  # type: ignore[arg-type]
WRONG_TYPES: Any = {
    "query": (lambda: lighthouse_attention(ROW.numpy(), ROW, ROW, SETTINGS), "query must be a torch.Tensor, not a ndarray"),
    "value": (lambda: lighthouse_attention(ROW, ROW, None, SETTINGS), "value must be a torch.Tensor, not a NoneType"),
    "config": (lambda: lighthouse_attention(ROW, ROW, ROW, SMALL), "config must be a .*LighthouseConfig, not a dict"),
    "config of a selection": (lambda: lighthouse_select(ROW, ROW, None), "config must be a .*LighthouseConfig, not a None"),
    "scale": (lambda: lighthouse_attention(ROW, ROW, ROW, SETTINGS, softmax_scale="1"), "softmax_scale must be a number"),
    "a scale of none": (lambda: lighthouse_attention(ROW, ROW, ROW, SETTINGS, softmax_scale=float("nan")), "softmax_scale nan"),
    "rotary": (lambda: lighthouse_attention(ROW, ROW, ROW, SETTINGS, rotary=ROW), "rotary must be a .*Rotary, not a Tensor"),
    "group": (
        lambda: lighthouse_attention(ROW, ROW, ROW, SETTINGS, cp_group=2),
        "cp_group must be a .*Group, not a int",
    ),
    "documents": (
        lambda: lighthouse_attention(ROW, ROW, ROW, SETTINGS, cu_seqlens=[0, 64]),
        "cu_seqlens .* not a list",
    ),
    "attend": (lambda: lighthouse_attention(ROW, ROW, ROW, SETTINGS, attend="fa2"), "attend must be a function .* 'fa2'"),
    "frequencies": (lambda: Rotary([1.0]), "Rotary: inv_freq must be a torch.Tensor, not a list"),
    "length": (lambda: LighthouseConfig.for_length(1024.0), "seq_length 1024.0 must be a whole number"),
    "r": (lambda: parallax_attention(ROW, None, ROW, ROW), "r must be a torch.Tensor, not a NoneType"),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_a_wrong_type_is_said_by_its_argument(name: str) -> None:
    call, says = WRONG_TYPES[name]
    with pytest.raises((TypeError, ValueError), match=f"^{says}"):
        call()


@pytest.mark.parametrize(
    ("words", "seq_length", "ranks", "says"),
    [
        (["--lighthouse-budget", "40"], 0, 1, "--lighthouse-budget 40 must be a positive multiple of --lighthouse-tile-budget"),
        (["--lighthouse-edge-budget", "40"], 0, 1, "--lighthouse-edge-budget 40 must be a positive multiple"),
        (["--lighthouse-budget", "1536"], 12345, 1, "--seq-length 12345 must be a multiple"),
        (["--lighthouse-edge-budget", "3072"], 24576, 1, "--lighthouse-edge-budget 3072 refines more windows"),
        (["--lighthouse-scorer", "dilated", "--lighthouse-pooling", "2"], 98304, 7, "--context-parallel-size 7"),
        (
            ["--lighthouse-scorer", "gla", *"--lighthouse-levels 2 --lighthouse-pooling 3 --lighthouse-budget 128".split()],
            4605,
            1,
            "--seq-length 4605 must be a multiple of 4 for --lighthouse-scorer gla",
        ),
    ],
)
def test_the_command_line_names_flags(words: list[str], seq_length: int, ranks: int, says: str) -> None:
    parser = settings.add_arguments(argparse.ArgumentParser())
    try:
        found = [*checks.settings_problems(settings.settings_from(parser.parse_args(words)), seq_length, ranks)]
    except ValueError as error:
        found = [str(error)]
    assert any(message.startswith(says) for message in found), found
    assert not any(re.search(r"config\.|cp_group|query's N", message) for message in found)
