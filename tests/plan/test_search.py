"""The ranking offers only what the config accepts and what fits; refusals and the command line."""

from __future__ import annotations

import itertools
import os
import re
import runpy
import signal
import subprocess
import sys
from collections import Counter

import pytest

from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.plan import lengths, memory, report, search, time
from megatron_lighthouse.plan.__main__ import main
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import device_of
from megatron_lighthouse.plan.models import run_of_model
from megatron_lighthouse.plan.run import RECOMPUTE, Run, run_of
from megatron_lighthouse.plan.stages import Stages
from megatron_lighthouse.plan.words import layout_words
from tests.mcore.forks import warm


@pytest.mark.parametrize(
    "run",
    [
        run_of("530m-98k", device=device_of("h100")),
        run_of("530m-1m"),
        run_of("llama3-8b-512k"),
        run_of("530m-98k", seq_length=98304 + 192, gpus=6, global_batch=6),
    ],
    ids=["530m on h100", "1m", "8b", "six GPUs, an odd length"],
)
def test_ranking(run: Run) -> None:
    found = search.rank(run, coefficients())
    assert found.layouts
    for layout, rate in found.layouts:
        layout.config.geometry(layout.seq_length, layout.context_parallel)  # raises where it refuses
        both = layout.check(), layout.change(attention="dense").check()
        assert all(memory.total(stage) <= layout.device.memory_gib * 2**30 for stage in both)
        first, second = (time.tokens_per_gpu(stage, coefficients()) for stage in both)
        assert rate == pytest.approx(1 / (0.6 / first + 0.4 / second))
    rates = [rate for _, rate in found.layouts]
    assert rates[0] == max(rates)
    assert all(a >= b - 1e-3 for a, b in itertools.pairwise(rates))


def test_context_parallelism_that_does_not_fit_is_left_out() -> None:
    """98,304 + 16·12 = 98,496 is 16 · 6156: of 2C chunks of whole windows only for C that 3078 is a multiple of."""
    found = search.rank(run_of("530m-98k", seq_length=98496, gpus=4, global_batch=4), coefficients())
    assert {r.context_parallel for r, _ in found.layouts} == {1, 2}
    assert found.refused["--context-parallel-size"]


def test_longest_fits_and_the_next_does_not() -> None:
    run = run_of("530m-256k-cp8")
    longest = lengths.of_layout(run)
    assert longest
    assert longest >= run.seq_length
    assert memory.fits(run.change(seq_length=longest).check())
    assert not memory.fits(run.change(seq_length=2 * longest))


def test_longest_of_none() -> None:
    run = run_of("llama3-8b-512k", gpus=1, tensor_parallel=1, context_parallel=1, pipeline_parallel=1, global_batch=1)
    assert lengths.of_layout(run) is None


def test_crossover_grows() -> None:
    ratios = [ratio for _, _, ratio in search.crossover(run_of("530m-98k", device=device_of("h100")), coefficients())]
    assert ratios[0] < 1 < ratios[-1]
    assert ratios == sorted(ratios)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipe", "nothing"], ["--recipe 'nothing'", "use 530m-98k"]),
        (["--device", "a100"], ["--device 'a100'", "h100 or h200"]),
        (["--seq-length", "98305"], ["--seq-length 98305 must be a multiple of 256", "use --seq-length 98304"]),
        (["--seq-length", "99999999999"], ["--seq-length 99999999999 must be a multiple of", "use --seq-length 99857989632"]),
        (["--tensor-model-parallel-size", "3"], ["--tensor-model-parallel-size 3 must divide", "use 1 or 2 or 4 or 8"]),
        (
            ["--pipeline-model-parallel-size", "4"],
            ["--pipeline-model-parallel-size 4 must divide --num-layers 30", "use 1 or 2"],
        ),
        (["--gpus", "12", "--context-parallel-size", "8"], ["--gpus 12 must be a multiple of", "use 8"]),
        (["--global-batch-size", "9"], ["--global-batch-size 9 must be a multiple of the 8", "use 8 or 16"]),
        (["--context-parallel-size", "0"], ["--context-parallel-size 0 must be at least 1"]),
        (["--num-query-groups", "3"], ["--num-query-groups 3 must divide --num-attention-heads 8"]),
        (["--lighthouse-budget", "100"], ["--lighthouse-budget 100 must be a positive multiple", "use"]),
        (["--attention", "sparse"], ["--attention 'sparse'", "dense or lighthouse"]),
        (["--tokens", "0"], ["--tokens 0 must be above 0"]),
        (["--num-layers", "3"], ["--lighthouse-dense-last 2 leave none of 3 layers", "-first 1 and"]),
        (["scaling", "/nowhere"], ["scaling /nowhere", "run.json"]),
    ],
    ids=lambda x: " ".join(x[:2]) if isinstance(x, list) and x[0].startswith(("-", "s")) else "",
)
def test_refusals(arguments: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    for text in said:
        assert text in error


@pytest.mark.parametrize("command", ["plan --list", "profiling --help"])
def test_a_reader_that_has_enough_is_no_error(command: str) -> None:
    """As where the report is piped into `head`."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", *f"megatron_lighthouse.{command}".split()]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, env={**os.environ, **warm()})
    os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


def test_report_says_what_it_is_worth(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "530m-256k-cp8", "--details"]) == 0
    out = capsys.readouterr().out
    for part in ("memory per GPU", "time of a step", "context parallel", "longest context", "ranking of", "recommended:"):
        assert part in out
    for part in ("GPU-hours", "error of this model", "published", "extrapolated from H100"):
        assert part in out
    h100 = report.time_table(run_of("530m-98k", device=device_of("h100")), coefficients())
    assert "extrapolated" not in h100


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_entry_point(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", "--list"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("megatron_lighthouse.plan", run_name="__main__")
    assert stop.value.code == 0
    assert "llama3-8b-1m" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "nan"], "--tokens nan must be above 0, and finite"),
        (["--tokens", "inf"], "--tokens inf must be above 0, and finite"),
        (
            ["--kv-channels", "100"],
            "--kv-channels 100 must be a multiple of 8 and at most 256, as attention kernels want: use 104",
        ),
        (["--kv-channels", "264"], "use 256"),
        (["--recipe", "nowhere.args"], "--recipe nowhere.args cannot be read"),
    ],
)
def test_what_is_no_number_of_a_run(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_capitals_do_not_matter() -> None:
    assert device_of("GB200") is device_of("gb200")


def test_recommended_leaves_room() -> None:
    """For what the count may be wrong by; the fastest of this run does not."""
    run = run_of("530m-1m", loss_tile_tokens=0)
    found = search.rank(run, coefficients())
    first, (best, rate) = found.layouts[0][0], found.recommended
    usable = run.device.usable_bytes
    first, best = Stages(first).fullest, Stages(best).fullest
    assert memory.total(first) / (1 - 0.1) > usable >= memory.total(best) / (1 - 0.1)
    assert all(memory.total(Stages(r).fullest) > 0.9 * usable for r, other in found.layouts if other > rate)
    said = report.ranking(run, found, coefficients()).splitlines()
    assert said[1].endswith("tight")
    assert "tight: less than 10% room" in said[-2]
    assert said[-1] == f"recommended: {layout_words(found.recommended[0])}"


def test_where_all_are_tight_the_fastest_is_recommended() -> None:
    device, length = device_of("h100"), 98304 + 192 * 40
    run = run_of("530m-98k", device=device, gpus=1, global_batch=1, seq_length=length, loss_tile_tokens=0)
    tight = [r for r in (run.change(recompute=again) for again in RECOMPUTE) if memory.tight(r)]
    found = search.Ranking([(r, 2.0 - i) for i, r in enumerate(tight)], Counter())
    assert len(tight) > 1
    assert found.recommended == (tight[0], 2.0)


def test_the_longest_context_is_answered_whatever_the_layout() -> None:
    """Both stages fit it, by recomputing; no layout fits the next length that is tried."""
    run = run_of_model("llama3-8b", seq_length=2**17, gpus=8, global_batch=8)
    found = lengths.of_gpus(run)
    assert found
    assert all(memory.fits(one.check()) for one in Stages(found).runs)
    assert (found.recompute, found.gpus) == ("full", 8)
    following = found.seq_length + 2 ** (found.seq_length.bit_length() - 4)
    config = LighthouseConfig.for_length(following)
    longer = run.change(seq_length=following, config=config, global_batch=1)
    assert not search.rank(longer, coefficients()).layouts


def test_the_answer_says_the_longest_context_and_a_refusal_offers_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model llama3-8b --gpus 4 --device h100 --seq-length".split()
    assert main([*words, "128K"]) == 0
    (length,) = re.findall(r"^longest context of these GPUs: ([\d,]+) tokens", capsys.readouterr().out, re.MULTILINE)
    assert main([*words, str(int(length.replace(",", "")) * 3 // 2)]) == 2
    (offered,) = re.findall(r"or --seq-length (\d+)\.$", capsys.readouterr().err.strip())
    assert length.replace(",", "") == offered
    assert main([*words, offered]) == 0
