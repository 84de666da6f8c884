"""Megatron's words to the plan's run: the recipes of launch/ are those of recipes.toml, and what is not counted is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_lighthouse.plan import memory, report, time
from megatron_lighthouse.plan.__main__ import main, parser, run_from
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.model import UNTIED
from megatron_lighthouse.plan.run import RECOMPUTE, Run, recipes, run_of
from megatron_lighthouse.plan.words import layout_words, recipe_words, run_of_words

FILES = Path(__file__).parents[2] / "launch/recipes"
B200 = DEVICES["b200"]


def of(name: str, more: str = "", gpus: int | None = None) -> Run:
    return run_of_words([*recipe_words(FILES / f"{name}.args"), *more.split()], B200, gpus)


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_of_launch_is_that_of_the_plan(name: str) -> None:
    assert of(name, gpus=run_of(name).gpus).check() == run_of(name)


def test_what_megatron_takes_where_nothing_is_given() -> None:
    words = [word for word in recipe_words(FILES / "530m-98k.args") if word not in ("--kv-channels", "128")]
    model = run_of_words([*words, "--num-query-groups", "2", "--hidden-size", "2048"], B200).model
    assert (model.groups, model.head_dim, model.vocab) == (8, 256, 128256)  # no --group-query-attention
    assert of("530m-98k", "--group-query-attention").model.groups == 1
    del words[words.index("--ffn-hidden-size") : words.index("--ffn-hidden-size") + 2]
    assert run_of_words(words, B200).model.ffn == 2688  # int((4 * 1024 * 2 / 3) / 64) * 64
    assert of("530m-98k", "--vocab-size 32000").model.vocab == 32000
    assert of("530m-98k", "--vocab-size 32000 --text-data a b --bf16").model.vocab == 384
    assert of("530m-98k", "--vocab-size 32000 --tokenizer-type HuggingFaceTokenizer").model.vocab == 128256  # its own, not here
    assert (of("530m-1m").gpus, of("530m-1m").global_batch, of("530m-1m", gpus=32).global_batch) == (8, 1, 4)
    assert not of("530m-98k", "--no-lighthouse-discard-output").discard_output
    tied = [word for word in recipe_words(FILES / "530m-98k.args") if word != UNTIED]
    assert (of("530m-98k").model.tied, run_of_words(tied, B200).model.tied) == (False, True)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("--recompute-activations", "none"),
        ("--recompute-granularity selective --recompute-modules core_attn mlp", "mlp"),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", "full"),
    ],
)
def test_recompute(more: str, expected: str) -> None:
    assert of("530m-98k", more).recompute == expected


def test_gradients_in_bf16_take_half_of_memory_and_link(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a parameter: of a file, of a name, and of a model; a data-parallel rank sends them, and gets parameters in bf16."""
    flag = "--grad-reduce-in-bf16"
    plain, less = of("530m-98k", gpus=8), of("530m-98k", flag, gpus=8)
    assert memory.parts(less)["gradients (bf16)"] * 2 == memory.parts(plain)["gradients (fp32)"] == 4 * plain.parameters
    assert memory.total(plain) - memory.total(less) == 2 * plain.parameters
    sent = [time.link_bytes(run)[2] for run in (less, plain)]
    assert sent == pytest.approx([n * plain.parameters * 7 / 8 for n in (2 + 2, 4 + 2)])
    for start in ("--recipe 530m-98k", f"--recipe {FILES / '530m-98k.args'}", "--model llama3-8b"):
        assert run_from(parser().parse_args([*start.split(), flag])).gradient_bytes == 2
        assert run_from(parser().parse_args(start.split())).gradient_bytes == 4
    assert main(["--recipe", "530m-98k", "--details", flag]) == 0
    assert "gradients (bf16)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "gpus", "kind"),
    [
        ("", 1, "none"),
        ("--cuda-graph-impl local", 1, "local"),
        ("--graphs auto --seq-length 32768", 1, "full_iteration"),
        ("--graphs auto --seq-length 32768", 2, "none"),  # over several ranks it leaves them off
        ("--graphs auto", 1, "none"),  # as at 98,304 tokens
        ("--graphs auto --cuda-graph-impl local", 2, "local"),
    ],
)
def test_a_run_has_the_graphs_that_it_would_take(more: str, gpus: int, kind: str) -> None:
    run = of("530m-98k", more, gpus=gpus).check()
    assert run.options.get("cuda_graph_impl", "none") == kind
    speed = coefficients()
    alone, ours = (sum(time.step_parts(run, one).values()) for one in (speed.without_host(), speed))
    assert (alone == ours) == (kind != "none")


def test_graphs_of_a_model_and_of_a_recipe_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--cuda-graph-impl", "local", "--details", "--recompute", "none", "--gpus", "1", "--device", "h200"]
    for start in (["--recipe", "530m-98k", "--seq-length", "32K"], ["--model", "qwen3-0.6b", "--seq-length", "32K"]):
        assert main([*start, *given]) == 0
        assert "host: the GPU does not wait for it within CUDA graphs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recompute": "full"}, "--recompute-granularity full with --cuda-graph-impl local"),
        ({"mlp_tile_tokens": 4096}, "--mlp-tile-tokens 4096 with --cuda-graph-impl local"),
    ],
)
def test_graphs_that_a_run_refuses_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of("530m-98k", "--cuda-graph-impl local").change(**change).check()


def test_a_causal_selection_gathers_as_many_rows_and_keeps_a_second_map() -> None:
    plain, causal = of("530m-98k"), of("530m-98k", "--lighthouse-causal-selection")
    assert causal.geometry.gathered_length == plain.geometry.gathered_length == 18432
    more = memory.lighthouse_activations(causal) - memory.lighthouse_activations(plain)
    assert more == 4 * (98304 + 98304 // 4 + 98304 // 16) * plain.model.groups


@pytest.mark.parametrize(("recompute", "tile"), [*((name, 0) for name in RECOMPUTE), ("full", 8192)])
def test_the_words_of_a_layout_give_it_back(recompute: str, tile: int) -> None:
    sizes = {"tensor_parallel": 2, "context_parallel": 4, "pipeline_parallel": 2}
    run = run_of("530m-98k", gpus=16, global_batch=8, cp_comm_type="a2a", recompute=recompute, mlp_tile_tokens=tile, **sizes)
    assert of("530m-98k", f"{layout_words(run)} --global-batch-size 8", gpus=16) == run


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--num-experts 8", "--num-experts is not counted"),
        ("--multi-latent-attention", "--multi-latent-attention is not counted"),
        ("--skip-train", "--skip-train"),
        ("--micro-batch-size=2", "--micro-batch-size 2 is not counted by the plan: use 1"),
        ("--tensor-model-parallel-size 2", "add it"),
        ("--cp-comm-type p2p a2a", "one of p2p, all_gather, a2a"),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers 3",
            "--recompute-num-layers 1: use that",
        ),
        ("--transformer-impl local", "use transformer_engine"),
    ],
)
def test_what_is_not_counted_is_refused(more: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        of("530m-98k", more)


def test_sizes_that_are_missing_or_do_not_divide() -> None:
    words = recipe_words(FILES / "530m-98k.args")
    with pytest.raises(ValueError, match="--num-layers --swiglu is missing"):
        run_of_words([word for word in words if word not in ("--num-layers", "--swiglu")], B200)
    with pytest.raises(ValueError, match=r"--hidden-size 1001 must be a multiple of --num-attention-heads 8 .* use 1008"):
        run_of_words([*(w for w in words if w not in ("--kv-channels", "128")), "--hidden-size", "1001"], B200)


def test_the_command_takes_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """And what is given beside it wins, as in a named recipe."""
    for more in ([], ["--attention", "dense", "--recompute", "full", "--vocab-size", "384", "--context-parallel-size", "16"]):
        options = ["--gpus", "32", *more]
        runs = [
            run_from(parser().parse_args(["--recipe", name, *options])) for name in (str(FILES / "530m-1m.args"), "530m-1m")
        ]
        assert runs[0].change(global_batch=4) == runs[1]
        assert ("the vocabulary is assumed: 128,256. --vocab-size sets another." in capsys.readouterr().err) == (not more)
    assert main(["--recipe", str(FILES / "cpu-test.args")]) == 2
    assert "--bf16 --use-distributed-optimizer is missing" in capsys.readouterr().err
    assert "Lighthouse in 26 of 30" in report.title(runs[0].change(attention="lighthouse"))


@pytest.mark.parametrize("recipe", ["530m-98k", str(FILES / "530m-98k.args")], ids=["name", "file"])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpus", "0"], "--gpus 0 must be at least 1: use 1 or more."),
        (["--attention", "foo"], "--attention 'foo' is not known: use dense or lighthouse or parallax or wall."),
        (["--cp-comm-type", "foo"], "--cp-comm-type 'foo' is not known: use p2p or all_gather or a2a."),
        (["--recompute", ""], "--recompute '' is not known: use none or mlp or full."),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_file_is_refused_as_a_name_is(
    recipe: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--recipe", recipe, *arguments]) == 2
    assert capsys.readouterr().err == says + "\n"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--attention foo", "--attention: invalid choice: 'foo' .choose from .*lighthouse"),
        ("--num-layers x", "--num-layers x must be a whole number, in digits alone: give one."),
        ("--num-layers", "--num-layers: expected one argument"),
    ],
)
def test_words_that_cannot_be_read_are_refused_by_the_plan(more: str, says: str) -> None:
    """And not by argparse, which would show how to call a program that there is not."""
    with pytest.raises(ValueError, match=says):
        of("530m-98k", more)
