"""Options that ask for others or exclude them: refused before queuing, with what Megatron then takes."""

from __future__ import annotations

import re
from argparse import Namespace

import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.launch import megatron as asked_megatron
from megatron_lighthouse.mcore.command_line import flags, together
from megatron_lighthouse.mcore.command_line.entry import with_all_arguments
from tests.mcore.test_launch_check import GPUS, LLAMA

FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
PLAIN = " ".join(LLAMA).replace(FULL, "").replace("--cross-entropy-loss-fusion", "").split()
"""Without what the cases give themselves."""

MAJOR = 10
"""Compute capability of the GPUs: on others Megatron asks FSDP for a setting of the environment."""
RULES = {
    "fsdp": ("--use-megatron-fsdp", "use --ckpt-format fsdp_dtensor", "--use-megatron-fsdp --ckpt-format fsdp_dtensor"),
    "its format": ("--ckpt-format fsdp_dtensor", "use torch_dist, or add that", ""),
    "its optimizer": (
        "--use-megatron-fsdp --ckpt-format fsdp_dtensor --optimizer muon",
        "does not go with --optimizer muon: use adam",
        "--use-megatron-fsdp --ckpt-format fsdp_dtensor --optimizer adam",
    ),
    "torch's format": ("--ckpt-format torch_dcp", "use torch_dist, or add that", ""),
    "torch's": ("--use-torch-fsdp2", "exclude each other", ""),
    "offload": (
        "--optimizer-cpu-offload",
        "needs --use-precision-aware-optimizer",
        "--optimizer-cpu-offload --use-precision-aware-optimizer",
    ),
    "recompute": ("--recompute-granularity full", f"add {FULL.partition(' full ')[2]}", FULL),
    "its method": (
        "--recompute-granularity selective --recompute-method uniform",
        "is of --recompute-granularity full: leave it out",
        "--recompute-granularity selective",
    ),
    "one stage": ("--num-layers-per-virtual-pipeline-stage 2", "there is one: leave it out", ""),
    "parts of layers": (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
        "must divide the 16 layers of a pipeline stage: use 2 or 4 or 8",
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 4",
    ),
    "warm-up": ("--lr-warmup-iters 100", "use --lr-warmup-fraction 0.005 alone", "--lr-warmup-fraction 0.005"),
    "overlap": (
        "--tp-comm-overlap --tensor-model-parallel-size 1",
        "needs --sequence-parallel and a --tensor-model-parallel-size above 1",
        "--tp-comm-overlap",
    ),
    "cross entropy": (
        "--cross-entropy-loss-fusion --cross-entropy-fusion-impl te",
        "was not stable: use native",
        "--cross-entropy-loss-fusion --cross-entropy-fusion-impl native",
    ),
    "graphs": (
        "--cuda-graph-impl full_iteration --cp-comm-type all_gather",
        "needs --no-check-for-nan-in-loss-and-grad",
        "--cuda-graph-impl full_iteration --cp-comm-type all_gather --no-check-for-nan-in-loss-and-grad",
    ),
    "two sizes": (
        "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 3 2",
        "make 6 ranks, and --context-parallel-size is 4: give two sizes whose product is 4",
        "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2",
    ),
    "activations": ("--squared-relu", "exclude each other", ""),
    "experts": ("--expert-model-parallel-size 2", "is of experts, and there are none: leave it out", ""),
}
"""Words that are wrong, what is said of them, and what works in their place."""


@pytest.mark.parametrize("name", RULES)
def test_megatron_refuses_and_takes_as_much(
    name: str, megatron: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)  # which FSDP wants otherwise than tensor parallelism
    wrong, says, right = RULES[name]
    assert check.main([*GPUS, "--without-megatron", "--", *PLAIN, *wrong.split()]) == 1
    assert re.search(re.escape(says), error := capsys.readouterr().err), error
    assert asked_megatron.problems([*PLAIN, *wrong.split()], 64, MAJOR, {}, False)
    assert check.main([*GPUS, "--without-megatron", "--", *PLAIN, *right.split()]) == 0, capsys.readouterr().err
    assert asked_megatron.problems([*PLAIN, *right.split()], 64, MAJOR, {}, False) == []


WINDOWS = "--window-size 128,0 --cp-comm-type a2a --window-attn-skip-freq"
TAKEN = {
    "one part of a stage": "--num-virtual-stages-per-pipeline-rank 1",
    "windows by an expression": f"{WINDOWS} ([1,0]*16)",
    "windows by a list": f"{WINDOWS} [{','.join(['1', '0'] * 16)}]",
    "a recipe of fp8 that nothing asks for": "--fp8-recipe blockwise",
    "a method of recomputation likewise": "--recompute-method uniform --recompute-num-layers 1",
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_megatron_takes_is_not_refused(name: str, megatron: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*PLAIN, *TAKEN[name].split()]
    assert check.main([*GPUS, "--without-megatron", "--", *words]) == 0, capsys.readouterr().err
    assert asked_megatron.problems(words, 64, MAJOR, {}, False) == []


def test_a_list_of_layers_is_evaluated_as_megatron_does(megatron: None) -> None:
    from megatron.training.arguments import moe_freq_type

    for text in ("3", "([0]+[1]*31)", "([1]*3+[0]*2)*2", "[1,0,1]", "2*[1]+[0]"):
        assert flags.TYPES["moe_freq_type"](text) == moe_freq_type(text)
    for text in ("[__import__('os')]", "[1", "[1]-[0]"):
        with pytest.raises((ValueError, SyntaxError)):
            flags.TYPES["moe_freq_type"](text)


def test_connections_of_a_device_are_those_of_the_job(megatron: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP wants several, and the scripts ask for one only where ranks share layers."""
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    sharded = ["--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor"]
    alone = ["--tensor-model-parallel-size", "1", "--context-parallel-size", "1"]
    words = [word for word in PLAIN if word != "--sequence-parallel"]
    assert asked_megatron.problems([*words, *alone, *sharded], 16, 9, {}, False) == []
    assert "CUDA_DEVICE_MAX_CONNECTIONS" in asked_megatron.problems([*PLAIN, *sharded], 64, 9, {}, False)[0]


def test_parameters_are_gathered_beside_a_sharded_optimizer() -> None:
    def said(*words: str) -> list[str]:
        args: Namespace = flags.parse(words, with_all_arguments)[0]
        return [*together.problems(args)]

    assert said("--overlap-param-gather", "--overlap-grad-reduce", "--use-distributed-optimizer") == []
    assert "needs --use-distributed-optimizer" in said("--overlap-param-gather", "--overlap-grad-reduce")[0]
    assert "needs --overlap-grad-reduce" in said("--overlap-param-gather", "--use-distributed-optimizer")[0]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 64 --expert-model-parallel-size 64",
            r"64 x --expert-tensor-parallel-size 2 .* = 128 must divide the 64 GPUs: use --expert-tensor-parallel-size 1, or "
            "--expert-model-parallel-size 8",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 12",
            "makes 3 micro batches, of which stages of several parts take groups of 2: use --global-batch-size 8 or 16",
        ),
        ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3", "must divide the 16 layers"),
        ("--fp8-format hybrid --transformer-impl local", "is read by Transformer Engine's layers alone: leave it out"),
        ("--hybrid-layer-pattern " + "+-" * 16, "--group-query-attention does not go with multi-latent attention"),
        ("--hybrid-layer-pattern " + "+-" * 16 + " --lighthouse-scorer dilated", "reads values of as many channels as keys"),
        ("--heterogeneous-layers-config-path nowhere.json", "nowhere.json is not there: give a file that all nodes see"),
        ("--window-size 4096 --window-attn-skip-freq 2", "must be two numbers, .*: use 4096,0"),
        (
            "--window-size 128,128 --window-attn-skip-freq 2 --transformer-impl local",
            "is none of a causal model: use 128,0",
        ),
        ("--no-rope-freq 5", "--no-rope-freq 5 must divide the 32 layers: use 4 or 8, or a list"),
        ("--no-rope-freq [0,1]", r"is of 2 layers, and the model has 32: give one number a layer"),
        ("--position-embedding-type learned_absolute --no-rope-freq 4", "--no-rope-freq 4 means nothing with"),
        ("--qk-layernorm --qk-l2-norm", "--qk-layernorm and --qk-l2-norm exclude each other"),
        ("--hybrid-layer-pattern " + "*-" * 16 + "/*-", "--mtp-num-layers 1 with --context-parallel-size 4"),
        ("--wall-gate-bias 2", "is read with --attention wall or --lighthouse-around wall alone: leave it out"),
        ("--attention parallax --wall-tied-gates", "--wall-tied-gates is read with --attention wall"),
        ("--attention dense --wall-gate-bias 6", "--wall-gate-bias 6.0 is read with --attention wall"),
        ("--lighthouse-around wall", "--lighthouse-around wall, .* use --wall-paired-gates, or --position-embedding-type none"),
        ("--multi-latent-attention --lighthouse-around parallax", "is not done by --lighthouse-around parallax: leave"),
    ],
)
def test_what_would_fail_once_it_runs(more: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of which Megatron's own rules say nothing, or only when groups and layers are made."""
    assert check.main([*GPUS, "--without-megatron", "--", *LLAMA, *more.split()]) == 1
    assert re.search(says, error := capsys.readouterr().err), error


@pytest.mark.parametrize("attention", ["dense", "parallax --lighthouse-budget 2048", "lighthouse --lighthouse-around parallax"])
def test_options_of_the_stage_before_are_handed_on(attention: str) -> None:
    assert check.main([*GPUS, "--without-megatron", "--", *LLAMA, "--attention", *attention.split()]) == 0
