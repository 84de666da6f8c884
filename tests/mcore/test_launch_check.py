"""The check before queuing: what the run refuses is refused there, by Megatron's parser and rules where it can be imported."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.softmax import names
from megatron_lighthouse.softmax.backends import BACKENDS
from megatron_lighthouse.softmax.blocks import BLOCKS
from tests.launch.scripts import LAUNCH
from tests.launch.scripts import words as launch_words
from tests.mcore.harness import MODEL, TEXT, Processes

LLAMA = """
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention
    --num-query-groups 8 --kv-channels 128 --seq-length 131072 --max-position-embeddings 131072
    --micro-batch-size 1 --global-batch-size 16 --position-embedding-type rope --rotary-base 500000
    --use-rope-scaling --rope-scaling-factor 8 --normalization RMSNorm --norm-epsilon 1e-5 --disable-bias-linear --swiglu
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
    --transformer-impl transformer_engine --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 4 --cp-comm-type p2p
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --cross-entropy-loss-fusion --no-create-attention-mask-in-dataloader --no-gradient-accumulation-fusion
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-fraction 0.02 --weight-decay 0.1 --adam-beta2 0.95
    --clip-grad 1.0 --train-iters 20000 --save run/checkpoints --load run/checkpoints --save-interval 500 --log-interval 10
    --eval-interval 1000 --eval-iters 8 --distributed-timeout-minutes 60 --attention lighthouse --lighthouse-budget 2048
    --mock-data --tokenizer-type HuggingFaceTokenizer --tokenizer-model meta-llama/Meta-Llama-3-8B
""".split()
"""Llama-3 8B at 131,072 tokens on 64 GPUs: TP 2, CP 4, RoPE scaled."""
GPUS = ["--arch", "hopper", "--nodes", "8", "--gpus-per-node", "8"]

WRONG = {
    "a flag cut short": ("--lr-warmup-iter 100", "did you mean --lr-warmup-iters?"),
    "a value": ("--normalization rmsnorm", "--normalization: invalid choice: 'rmsnorm'"),
    "QK-norm": ("--qk-layernorm --lighthouse-scorer norm", "use --lighthouse-scorer mass, dilated or gla"),
    "QK-norm, causal": (
        "--qk-layernorm --lighthouse-scorer norm --lighthouse-causal-selection",
        "use --lighthouse-scorer dilated or gla",
    ),
    "MLA": ("--multi-latent-attention --lighthouse-scorer dilated", "reads values .* use --lighthouse-scorer norm"),
    "a window": ("--window-size 4096,0", r"--window-size 4096,0 .* give --window-attn-skip-freq N"),
    "windows over ranks": ("--window-size 4096,0 --window-attn-skip-freq 2", r"with --cp-comm-type p2p: .* a2a or all_gather"),
    "a scheme of other layers": (
        "--transformer-impl local --cp-comm-type a2a+p2p",
        "a2a.p2p is Transformer Engine's: use p2p, all_gather or a2a",
    ),
    "SFT": ("--sft", "--sft with --tokenizer-type HuggingFaceTokenizer: use SFTTokenizer"),
    "dropout": ("--attention-dropout 0.1", "use --attention-dropout 0 "),
    "a layout": ("--context-parallel-size 3", "= 6 must divide .*: use --context-parallel-size 2 or 4"),
    "a length": ("--seq-length 100000", "--seq-length 100000 must be"),
    "no interval": ("--save-interval 0", "--save .* add --save-interval N"),
    "an empty tokenizer": ("--tokenizer-model {empty}", "is empty: copy or write it again"),
    "a folder of none": ("--tokenizer-model {other}", "holds no tokenizer"),
    "no tokenizer": ("--tokenizer-type SentencePieceTokenizer", "--tokenizer-model meta-llama/.* is not there"),
    "the rate": ("--min-lr 1", "--lr 0.0003 must be at least --min-lr 1.0"),
    "tiles": ("--loss-tile-tokens -3", "use a number of tokens, or 0 for all"),
    "a warm-up": ("--lr-warmup-fraction 1", "use 0.02"),
    "WSD": ("--lr-decay-style WSD", "needs --lr-wsd-decay-iters"),
    "what nothing reads": ("--use-flash-attn", "use --attention-backend flash"),
    "dense over shards": (
        "--attention dense --transformer-impl local --window-size 128,128",
        r"--window-size 128,128 with --transformer-impl local is none of a causal model: use 128,0",
    ),
    "a window of later tokens": (
        "--transformer-impl local --window-size (-1,0) --window-attn-skip-freq 2 --context-parallel-size 1",
        r"--window-size -1,0 with --transformer-impl local is none of a causal model: use 127,0",
    ),
    "a scheme": (
        "--attention dense --transformer-impl local --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2",
        r"--cp-comm-type a2a\+p2p",
    ),
    "a scheme of no name": ("--cp-comm-type allgather", "allgather is not known: use p2p, all_gather, a2a or a2a"),
    "no evaluation": ("--eval-interval 0", "must be at least 1: .* use --eval-iters 0"),
    "no log": ("--log-interval 0", "--log-interval 0 must be at least 1"),
    "a negative rate": ("--lr -1", "--lr -1.0 must not be negative: use a learning rate"),
    "a negative start": ("--lr-warmup-init -1", "use --lr-warmup-init 0, or"),
    "no iteration": ("--train-iters 0", "--train-iters 0 trains nothing: give"),
    "a batch": ("--global-batch-size 12", "use --global-batch-size 8 or 16"),
    "its channels": ("--lighthouse-inner fa2 --kv-channels 132", "with head dimension 132: over several ranks use .* sdpa,"),
    "of other layers": ("--lighthouse-inner te --transformer-impl local", "use it with --transformer-impl transformer_engine"),
    "one that does not repeat": (
        "--lighthouse-inner cudnn --deterministic-mode --transformer-impl local",
        "cudnn does not repeat to the bit, as --deterministic-mode asks: use --lighthouse-inner auto.",
    ),
    "wide heads": ("--lighthouse-inner fa4 --cp-comm-type a2a --kv-channels 260", "does not take heads of 260 channels"),
    "FP8 attention": ("--fp8-dot-product-attention", "is read with --fp8-format alone: add --fp8-format hybrid"),
    "heads of FP8": ("--fp8-format hybrid --fp8-dot-product-attention --kv-channels 64", "takes heads of 128 channels"),
    "wide heads over shards": ("--lighthouse-inner fa4 --kv-channels 260", "does not take heads of 260 channels"),
    "documents over shards": (
        "--lighthouse-inner cudnn --dataloader-inter-document-masking --transformer-impl local",
        "cudnn does not attend over shards of packed documents: over several ranks use --lighthouse-inner auto or fa2 or sdpa",
    ),
    "schemes": ("--cp-comm-type p2p all_gather", "names 2, and --num-layers is 32: give one for all, such as p2p"),
    "schemes of windows": ("--window-size 9,0 --window-attn-skip-freq 2 --cp-comm-type a2a p2p", "names 2, and --num-layers"),
    "heads": (
        "--num-attention-heads 36",
        "must be a multiple of --num-query-groups 8: use --num-query-groups 6 or 12, or --num-attention-heads 32 or 40",
    ),
    "choices": ("--num-experts 8 --moe-router-topk 16", "must be at most --num-experts 8: use 2"),
    "ranks of experts": (
        "--num-experts 30 --expert-model-parallel-size 4",
        "use --expert-model-parallel-size 2, or --num-experts 28 or 32",
    ),
    "layers of experts": (
        "--num-experts 8 --moe-layer-freq ([0]+[1]*3)",
        "names 4 layers, and --num-layers is 32: give one number a layer",
    ),
    "channels of MLA": ("--multi-latent-attention --qk-pos-emb-head-dim 63", "must be even, for RoPE turns pairs: use 64"),
    "groups of MLA": ("--multi-latent-attention", "--group-query-attention does not go with .* leave it out"),
    "levels": ("--lighthouse-levels 9", "use --lighthouse-levels 5 --lighthouse-budget 512 --lighthouse-tile-budget 128"),
    "a yarn": ("--position-embedding-type yarn --rotary-percent 0.5", "--rotary-percent 0.5 is not read with"),
    "layers of a pattern": (
        "--hybrid-override-pattern M-*-*-*-*-*-",
        "disagrees with --hybrid-override-pattern .*, of 12 layers",
    ),
    "a save": ("--ckpt-format torch --async-save", "use --ckpt-format torch_dist"),
    "a second data": ("--data-path nowhere", "leave all but one out"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_words_without_megatron(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As on a login node that has none."""
    for folder in ("empty", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "other" / "README").write_text("x")
    more, says = WRONG[name]
    more = more.format(empty=tmp_path / "empty", other=tmp_path / "other")
    assert check.main([*GPUS, "--", *LLAMA, *more.split()]) == 1
    assert re.search(says, error := capsys.readouterr().err), error
    assert "leave none of 0 layers" not in error


def test_an_interval_of_evaluations_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron would divide by none once the model is built."""
    at = LLAMA.index("--eval-interval")
    without = [*LLAMA[:at], *LLAMA[at + 2 :]]
    assert check.main([*GPUS, "--without-megatron", "--", *without]) == 1
    error = capsys.readouterr().err
    assert "--eval-interval is missing, by which Megatron divides" in error
    assert "To evaluate never, add --eval-iters 0 too." in error
    assert check.main([*GPUS, "--without-megatron", "--", *without, "--eval-iters", "0"]) == 1
    assert "add --eval-interval 1000.\n" in capsys.readouterr().err  # and not what is there already


def test_an_attention_that_the_gpus_do_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    """As far as an architecture tells."""
    own, blackwell = ["--nodes", "8", "--gpus-per-node", "8", "--without-megatron"], ["--arch", "blackwell"]
    a2a = [*LLAMA, "--cp-comm-type", "a2a", "--tensor-model-parallel-size", "1", "--lighthouse-inner"]
    assert check.main([*own, *blackwell, "--", *a2a, "fa4"]) == 0
    assert check.main([*own, *blackwell, "--", *a2a, "fa3"]) == 1
    assert "--lighthouse-inner fa3 does not run on GPUs of compute capability 10" in capsys.readouterr().err
    assert check.main([*own, "--", *a2a, "fa4"]) == 1
    assert "--lighthouse-inner fa4 needs a GPU: use --lighthouse-inner auto or sdpa" in capsys.readouterr().err
    fp32 = [word for word in a2a if word != "--bf16"]
    assert check.main([*own, *blackwell, "--", *fp32, "cudnn"]) == 1
    assert "takes bf16 and fp16 alone: add --bf16" in capsys.readouterr().err


def test_grouped_experts_have_biases_without_a_fusion(capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron asserts it when the model is built, on every rank."""
    biased = [*(word for word in LLAMA if word != "--disable-bias-linear"), "--num-experts", "8", "--moe-grouped-gemm"]
    own = ["--nodes", "8", "--gpus-per-node", "8", "--without-megatron", "--"]
    assert check.main([*own, *biased]) == 1
    assert "add --no-bias-dropout-fusion, or --disable-bias-linear" in capsys.readouterr().err
    assert check.main([*own, *biased, "--no-bias-dropout-fusion"]) == 0


def test_the_names_are_those_of_the_backends() -> None:
    """That the check knows, which imports no torch."""
    assert [*BLOCKS] == [*names.OVER_SHARDS]
    assert {*BACKENDS} == {*names.INNER} - {"auto", "te"}


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        *((flag, flag) for flag in ("--hybrid-context-parallel", "--perform-rl-step", "--reset-attention-mask")),
        ("--text-data x", "--text-data and --mock-data"),
        ("--tensor-model-parallel-size 16", "--num-query-groups 8 must be"),
    ],
)
def test_a_rule_is_said_once(more: str, rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of those that the entry point, the layout and the attention have in common."""
    assert check.main([*GPUS, "--without-megatron", "--", *LLAMA, *more.split()]) == 1
    assert capsys.readouterr().err.count(f"  - {rule}") == 1


def test_a_login_node_without_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "iter_0000004").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.split(".")[0] == "torch"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert check.main([*GPUS, "--without-megatron", "--", *LLAMA, "--load", str(tmp_path)]) == 0
    assert "but not what checkpoints hold" in capsys.readouterr().out


def test_what_was_not_asked_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([*GPUS, "--", *LLAMA]) == 0
    assert "Megatron is not installed here" in capsys.readouterr().out
    assert check.main([*GPUS, "--without-megatron", "--", *LLAMA]) == 0
    assert "Megatron's own rules are the run's to ask" in capsys.readouterr().out


def asked(folder: Path, *words: str) -> tuple[list[int], str]:
    """The check in a process that has imported Megatron."""
    processes = Processes(folder, 1, words, "megatron_lighthouse.launch.check")
    return processes.wait(), processes.log.read_text()


OF_OTHERS = {"cpu-test", "llama3-8b-1m", "qwen3-0.6b-1m-1gpu", "qwen3-8b-1m-8gpu"}
RECIPES = sorted({path.stem for path in (LAUNCH / "recipes").glob("*.args")} - OF_OTHERS)
"""Those that 64 GPUs take."""

LATE = {
    "gradients": ("--main-grads-dtype bf16", "--main-grads-dtype can only be fp32 when not using precision-aware"),
    "buckets": ("--ddp-num-buckets 2 --ddp-bucket-size 100", "Cannot specify both num_buckets and bucket_size"),
    "without words": ("--decoder-seq-length 262144", "assert args.max_position_embeddings >= args.decoder_seq_length"),
    "of the model": ("--moe-router-topk 1 --num-experts 8 --moe-ffn-hidden-size 64", "use --moe-router-pre-softmax when topk"),
}
"""What Megatron refuses by rules of its own."""


def test_megatron_reads_the_words(tmp_path: Path) -> None:
    """A realistic line and every recipe is taken; wrong ones are refused, all in one go, as Megatron or the run puts it."""
    lines = {"llama": LLAMA[: LLAMA.index("--mock-data")]} | {name: launch_words(name)[:-4] for name in RECIPES}
    points = [word for name, words in lines.items() for word in ("--point", f"{name} {' '.join(words)}")]
    statuses, log = asked(tmp_path / "right", *GPUS, *points, "--", *LLAMA[LLAMA.index("--mock-data") :])
    assert [name for name in lines if f"{name}: 64 ranks" not in log] == [], log
    assert (statuses, "Megatron-core 0.19.2 reads it, and nothing is refused" in log) == ([0], True), log
    points = [word for name, (more, _) in LATE.items() for word in ("--point", f"{name.replace(' ', '-')} {more}")]
    statuses, log = asked(tmp_path / "wrong", *GPUS, *points, "--", *LLAMA)
    assert statuses == [1]
    for name, (_, says) in LATE.items():
        assert re.search(f"- {name.replace(' ', '-')}: .*{re.escape(says)}", log, re.IGNORECASE), (name, log)
    assert "Traceback" not in log


@pytest.mark.parametrize(
    "more",
    [
        ("--attention", "lighthouse", "--qk-layernorm", "--lighthouse-scorer", "norm"),
        ("--rope-scaling-factor", "32"),
        ("--save", "there"),
        ("--num-layer", "4"),
    ],
    ids=" ".join,
)
def test_the_check_says_what_the_run_says(more: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same sentence, for it is the same function."""
    run = Processes(tmp_path / "run", 1, [*MODEL, *TEXT, *more])
    assert run.wait() == [2]
    log = run.log.read_text()
    assert check.main(["--nodes", "1", "--gpus-per-node", "1", "--", *MODEL, *TEXT, *more]) == 1
    for line in capsys.readouterr().err.splitlines()[1:]:
        assert line.strip().removeprefix("- ") in log, (line, log[-2000:])


def test_a_usage_error_is_one_line(tmp_path: Path) -> None:
    for name, more, says in (
        ("flag", "--num-layer", "--num-layer is not a known flag: did you mean --num-layers?"),
        ("value", "--lr=x", "--lr x must be a number: give one."),
    ):
        run = Processes(tmp_path / name, 1, [*MODEL, *TEXT, more])
        assert run.wait() == [2]
        lines = [line for line in run.log.read_text().splitlines() if "Warning" not in line and "warn" not in line]
        assert [line for line in lines if says in line] == lines
