"""What the check says beside its refusals: options that nothing reads, and flags as Megatron has them."""

from __future__ import annotations

import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.launch import megatron as asked_megatron
from megatron_lighthouse.mcore.command_line import before, flags, ignored
from megatron_lighthouse.mcore.command_line.entry import with_all_arguments
from megatron_lighthouse.usage import ELSEWHERE, GONE, as_flag, unknown_flag
from tests.mcore.test_launch_check import GPUS, LLAMA
from tests.mcore.test_one_round import line
from tests.mcore.test_together import MAJOR

NOT_READ = {
    "--num-query-groups 8 !--group-query-attention": "--num-query-groups is not read without --group-query-attention.",
    "--lr-wsd-decay-iters 100": "--lr-wsd-decay-iters is not read without --lr-decay-style WSD.",
    "--position-embedding-type none": "are not read with --position-embedding-type none.",
    "--moe-router-topk 2 --moe-grouped-gemm": "--moe-router-topk, --moe-grouped-gemm are not read without --num-experts.",
    "--fp8-recipe delayed": "--fp8-recipe is not read without --fp8-format.",
    "--attention parallax": "--lighthouse-budget is not read without --attention lighthouse, or what --lighthouse-around names "
    "for its stage 2.",
    "--vocab-size 500": "--vocab-size is not read with such a --tokenizer-type, whose own size the model has "
    "(--padded-vocab-size sets another).",
    "--loss-scale 1024": "--loss-scale is not read without --fp16.",
    "--cuda-graph-modules attn": "--cuda-graph-modules is not read without --cuda-graph-impl.",
    "--cuda-graph-warmup-steps 5": "is not read without --cuda-graph-impl or --optimizer-cuda-graph.",
    "--muon-momentum 0.95": "--muon-momentum is not read without --optimizer muon.",
    "--hierarchical-context-parallel-sizes 2 2": "is not read without --cp-comm-type a2a+p2p.",
    "--recompute-modules mlp": "--recompute-modules is not read with --recompute-granularity full.",
    "--q-lora-rank 512": "--q-lora-rank is not read without --multi-latent-attention.",
}


@pytest.mark.parametrize("words", NOT_READ)
def test_what_is_not_read_is_said(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of a value that is Megatron's default."""
    assert check.main([*GPUS, "--without-megatron", "--", *line(words)]) == 0, capsys.readouterr().err
    (said,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("note: ")]
    assert said.endswith(NOT_READ[words])
    assert check.main([*GPUS, "--without-megatron", "--", *LLAMA]) == 0
    assert "note: " not in capsys.readouterr().out


def test_stage_2_is_told_nothing_of_stage_1(capsys: pytest.CaptureFixture[str]) -> None:
    """Whose recipe it has."""
    for words in ("--attention dense", "--attention parallax --lighthouse-around parallax"):
        assert check.main([*GPUS, "--without-megatron", "--", *line(words)]) == 0, capsys.readouterr().err
        assert "note: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--muon-momentum 0.9", "--muon-momentum is not read without --optimizer muon."),
        (
            "!--train-iters --train-samples 100000 --lr-wsd-decay-samples 100",
            "--lr-wsd-decay-samples is not read without --lr-decay-style WSD.",
        ),
    ],
)
def test_the_run_says_it_too(words: str, says: str, caplog: pytest.LogCaptureFixture) -> None:
    given = before.given(line(words))
    assert given is not None
    ignored.say(given)
    assert says in caplog.text


def test_what_words_say_is_known() -> None:
    args, _ = flags.parse(["--rope-scaling-factor=8", "--no-rope-fusion", "--window-size", "3,0"], with_all_arguments)
    assert args.said == {"rope_scaling_factor", "apply_rope_fusion", "window_size"}
    assert flags.parse([], with_all_arguments)[0].said == frozenset()


def test_flags_as_others_call_them() -> None:
    known = flags.parser(with_all_arguments)._option_string_actions
    assert {as_flag(name) for name in GONE} < {*known} > {*GONE.values()}
    for word, use in ELSEWHERE.items():
        assert word not in known
        if use == "--gpus":  # the plan's, whose own test has it
            continue
        assert {part for part in use.split() if part.startswith("--")} <= {*known}, use
        assert unknown_flag(word, known) == f"{word} is not a known flag: use {use}."
    for word, says in {
        "--apply-rope-fusion": "leave it out, for it is so without --no-rope-fusion.",
        "--masked-softmax-fusion": "leave it out, for it is so without --no-masked-softmax-fusion.",
        "--use-swiglu": "did you mean --swiglu?",
        "--enable-bf16": "did you mean --bf16?",
        "--no-use-distributed-optimizer": "leave it out, and --use-distributed-optimizer too.",
        "--disable-rope-fusion": "use --no-rope-fusion.",
        "--skip-load-optim": "use --no-load-optim.",
        "--without-load-rng": "use --no-load-rng.",
        "--dont-save-rng": "use --no-save-rng.",
        "--disable-masked-softmax-fusion": "use --no-masked-softmax-fusion.",
        "--disable-lighthouse-dense-first": "leave it out: --lighthouse-dense-first takes a value.",
        "--no-bias-linear": "use --disable-bias-linear.",
        "--no-train": "use --skip-train.",
        "--skip-sequence-parallel": "leave it out, and --sequence-parallel too.",
        "--disable-distributed-optimizer": "leave it out.",
        "--split-qkv": "leave it out.",
        "--no-split-qkv": "did you mean --muon-no-split-qkv?",
        "--no-rop-fusion": "did you mean --no-rope-fusion?",
        "--no-seq-length": "leave it out: --seq-length takes a value.",
        "--iters": "did you mean --train-iters, --eval-iters or --lr-decay-iters?",
        "--samples": "did you mean --train-samples, --lr-decay-samples or --lr-warmup-samples?",
        "--size": "did you mean --micro-batch-size, --vocab-size or --hidden-size?",
        "--batch-siz": "did you mean --micro-batch-size?",
        "--lighthouse-buget": "did you mean --lighthouse-budget?",
        "--dense-first": "did you mean --lighthouse-dense-first?",
    }.items():
        assert unknown_flag(word, known) == f"{word} is not a known flag: {says}"


@pytest.mark.parametrize(
    "more",
    [
        "--use-precision-aware-optimizer --main-grads-dtype bf16",
        "--non-persistent-ckpt-type local --non-persistent-local-ckpt-dir there",
    ],
)
def test_packages_of_the_job_are_not_asked_for_here(more: str, megatron: None) -> None:
    """As Transformer Engine's optimizer, which a login node has not."""
    assert asked_megatron.problems([*LLAMA, *more.split()], 64, MAJOR, {}, False) == []


def test_megatron_is_repeated_in_flags(megatron: None) -> None:
    (said,) = asked_megatron.problems([*LLAMA, "--moe-ffn-hidden-size", "64"], 64, MAJOR, {}, False)
    assert "Please set --num-experts or remove --moe-ffn-hidden-size" in said
    assert flags.in_flags("a_word of /a/seq_length.py, seq_length") == "a_word of /a/seq_length.py, --seq-length"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--wandb-exp-name=", "--wandb-project x with an empty --wandb-exp-name: give --wandb-exp-name NAME"),
        ("!--save !--save-interval", "has nowhere to keep its files: add --wandb-save-dir DIR, or --save DIR."),
    ],
)
def test_what_wandb_asks_for_late(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron raises it on the last rank, which alone writes."""
    own = [*GPUS, "--without-megatron", "--"]
    assert check.main([*own, *line(f"{words} --wandb-project x")]) == 1
    assert says in capsys.readouterr().err
    for more in ("--wandb-project x", "--wandb-project x --wandb-exp-name y", "!--save --wandb-project x --wandb-save-dir z"):
        assert check.main([*own, *line(more)]) == 0, capsys.readouterr().err
