"""The plan answers first: days, GPU-hours and a layout for both stages; and refuses what the run refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_lighthouse.plan import memory, numbers, search, time
from megatron_lighthouse.plan.__main__ import main, parser, run_from
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.models import run_of_model
from megatron_lighthouse.plan.run import run_of
from megatron_lighthouse.plan.stages import Stages
from megatron_lighthouse.plan.words import recipe_words, run_of_words

FILES = Path(__file__).parents[2] / "launch/recipes"
ASKED = "--tokens 20B --model llama3-8b --seq-length 512K --gpus 64 --device b200".split()


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 0
    return capsys.readouterr().out


def test_days_hours_and_layout_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    """And are those of its stages in that very layout."""
    out = said(capsys, *ASKED)
    first, second = out.splitlines()[:2]
    assert first == "20B tokens of llama3-8b (8,030M parameters) at 524,288 on 64 x HGX B200 180GB:"
    found = re.match(r"([\d.]+) hours, ([\d,]+) GPU-hours \[predicted, extrapolated from H100", second)
    assert found
    (flags,) = re.findall(r"^flags: (.*)$", out, re.MULTILINE)
    run = run_of_words([*recipe_words(FILES / "llama3-8b-512k.args"), *flags.split()], DEVICES["b200"], 64)
    run = run.change(recompute="none") if "--recompute" not in flags else run
    hours = 0.0
    for share, one in ((0.6, run), (0.4, run.change(attention="dense"))):
        assert memory.fits(one.change(loss_fusion=False).check())
        hours += 20e9 * share / time.tokens_per_gpu(one, coefficients()) / 3600
    assert float(found[2].replace(",", "")) == pytest.approx(hours, abs=1)
    assert float(found[1]) == pytest.approx(hours / 64, abs=0.1)
    assert len(out.splitlines()) < 20
    words = re.search(r"two_stage.sh --stage1 (\d+) --total (\d+) -- --global-batch-size (\d+)", out)
    before, total, batch = map(int, words.groups()) if words else (0, 0, 0)
    assert 0 <= total * batch * 2**19 - 20e9 < batch * 2**19
    assert before == pytest.approx(0.6 * total, abs=0.5)
    for part in ("stage 1, Lighthouse", "stage 2, dense", "dense throughout", "gain: stage 1 "):
        assert part in out
    assert "time of a step" not in out


def test_details_come_after_it_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", "llama3-8b-512k", "--device", "b200"]
    short, long = said(capsys, *words), said(capsys, *words, "--details")
    assert long.startswith(short)
    for part in (
        "of the first of 2 pipeline stages, the fullest",
        "by the slowest pipeline stage",
        "ranking of",
        "error of this",
    ):
        assert part in long


@pytest.mark.parametrize(
    ("text", "found"), [("20B", 20e9), ("1.5t", 1.5e12), ("10e9", 10e9), ("300m", 3e8), ("10,000,000", 1e7)]
)
def test_tokens_as_people_write_them(text: str, found: float) -> None:
    assert numbers.tokens(text) == found


@pytest.mark.parametrize(
    ("text", "found"), [("512K", 2**19), ("1M", 2**20), ("98304", 98304), ("98,304", 98304), ("0.5M", 2**19)]
)
def test_lengths_are_powers_of_two(text: str, found: int) -> None:
    assert numbers.length(text) == found


def test_fewer_tokens_than_a_step_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """As 20, where 20B is meant."""
    assert main("--model llama3-8b --gpus 8 --tokens 20".split()) == 2
    assert "--tokens 20 are fewer than the 4,194,304 of one step: give more, such as 20B" in capsys.readouterr().err
    assert main(["models", "--device", "h200"]) == 2
    assert "plan models takes nothing, and --device h200 was given" in capsys.readouterr().err


def test_what_is_no_number_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tokens", "5Q"])
    (error,) = capsys.readouterr().err.splitlines()
    assert error.endswith("--tokens: '5Q' is no number: use one such as 20B, 1.5T or 10e9. See --help.")


def test_a_layout_is_offered_only_where_both_stages_fit() -> None:
    run = run_of("llama3-8b-128k", device=DEVICES["h200"])
    one, both = (search.rank(run, coefficients(), fraction) for fraction in (1.0, 0.6))
    fits = {id(r): memory.fits(r.change(attention="dense")) for r, _ in one.layouts}
    assert not all(fits.values())  # there are such as fit stage 1 alone
    assert len(both.layouts) == sum(fits.values())
    assert all(memory.fits(r.change(attention="dense")) for r, _ in both.layouts)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--stage1-fraction", "1.5"], "--stage1-fraction 1.5 must be from 0 to 1: use 0.6"),
        (["--model", "llama3-8b", "--recipe", "530m-98k"], "give one"),
        (["--model", "gpt"], "--model 'gpt' is not known: use 530m or llama3-8b"),
        (["--model", "gpt-oss-20b"], "--num-experts and --window-size, which is not counted"),
        (["--model", "deepseek-v3"], "--num-experts and --multi-latent-attention, which is not counted"),
        (
            ["--model", "llama3-8b", "--qk-layernorm", "--lighthouse-scorer", "norm"],
            "--qk-layernorm makes all queries and keys nearly equally long",
        ),
        (["--model", "llama3-8b", "--seq-length", "1M", "--gpus", "1"], r"--gpus 1: no layout fits .*: use --gpus \d+\.$"),
    ],
    ids=lambda x: " ".join(x[:2]) if isinstance(x, list) else "",
)
def test_refusals(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize(
    "more",
    ["--qk-layernorm --lighthouse-scorer norm", "--attention-dropout 0.1", "--qk-clip",
     "--reset-attention-mask", "--log-max-attention-logit"],
)  # fmt: skip
def test_what_the_run_refuses_of_a_file_is_refused(more: str) -> None:
    words = [*recipe_words(FILES / "530m-98k.args"), *more.split()]
    with pytest.raises(ValueError, match=more.split()[0]):
        run_of_words(words, DEVICES["b200"]).check()
    assert run_of_words([*words, "--attention", "dense"], DEVICES["b200"]).check()


@pytest.mark.parametrize("attention", ["dense", "lighthouse"])
@pytest.mark.parametrize("flag", ["--dataloader-inter-document-masking", "--sft"])
def test_packed_documents_are_not_counted_as_one_sequence(attention: str, flag: str) -> None:
    words = [*recipe_words(FILES / "530m-98k.args"), flag, "--attention", attention]
    with pytest.raises(ValueError, match=f"{flag} is not counted by the plan"):
        run_of_words(words, DEVICES["b200"])


def test_each_scorer_costs_what_it_does() -> None:
    """`dilated` four times as much for twice the tokens; the others less, and none nothing beyond `norm`."""
    scores = {}
    for scorer in ("norm", "mass", "summary", "gla", "dilated"):
        for length in (2**18, 2**19):
            run = run_of_model("llama3-8b", length, {"scorer": scorer}, gpus=8, context_parallel=8, global_batch=1).check()
            scores[scorer, length] = time.step_parts(run, coefficients())["score"]
    growth = {scorer: scores[scorer, 2**19] / scores[scorer, 2**18] for scorer, _ in scores}
    assert growth["norm"] < 2.1
    assert growth["gla"] < 2.1
    assert 2.1 < growth["summary"] < 3.9
    assert 2.1 < growth["mass"] < 3.9
    assert growth["dilated"] == pytest.approx(4, abs=0.1)
    assert all(scores["norm", 2**18] < scores[scorer, 2**18] for scorer in ("mass", "summary", "gla", "dilated"))


def test_mass_adds_at_most_a_twentieth_to_a_step() -> None:
    """Of the paper's model at 98,304 tokens, and of one with normed queries and keys, by count."""
    for run in (run_of("530m-98k"), run_of_model("qwen3-8b", 98304, gpus=8, context_parallel=8, global_batch=8)):
        steps = [
            sum(time.step_parts(run.change(config=run.config.replace(scorer=scorer)), coefficients()).values())
            for scorer in ("norm", "mass")
        ]
        assert steps[0] <= steps[1] < 1.05 * steps[0]  # the first waits for the host either way


@pytest.mark.parametrize(
    ("words", "scorer"),
    [
        ("--model qwen3-8b", "mass"),
        ("--model qwen3-8b --lighthouse-scorer auto", "mass"),
        ("--recipe 530m-98k --qk-layernorm", "mass"),
        ("--recipe 530m-98k --lighthouse-scorer auto", "norm"),
        ("--recipe 530m-98k --qk-layernorm --lighthouse-scorer gla", "gla"),
    ],
)
def test_a_plan_takes_the_scorer_that_the_model_asks_for(words: str, scorer: str) -> None:
    assert run_from(parser().parse_args([*words.split(), "--seq-length", "131072"])).config.scorer == scorer


def test_a_recipe_takes_sizes_by_the_length() -> None:
    for recipe in ("530m-98k", str(FILES / "530m-98k.args")):
        run = run_from(parser().parse_args(["--recipe", recipe, "--seq-length", "1M", "--lighthouse-tile-budget", "64"]))
        assert (run.config.levels, run.config.budget, run.config.tile_budget) == (4, 4096, 64)
    assert Stages(run, 1.0).runs == [run]
