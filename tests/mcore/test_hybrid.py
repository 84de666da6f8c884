"""Hybrid models through the entry point: a GPT's layers named one by one are that GPT, at any layout."""

from __future__ import annotations

import re
from argparse import Namespace
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from megatron_lighthouse.launch.layout import stages
from megatron_lighthouse.mcore.attention.copied import copied
from megatron_lighthouse.mcore.command_line import hybrid
from megatron_lighthouse.mcore.command_line.layers import attention_layers
from tests.mcore import harness
from tests.mcore.harness import MODEL, Run, some_slow, without
from tests.mcore.test_parity import START, assert_same

UNNAMED = without(MODEL, "--num-layers")
run = partial(harness.run, model=UNNAMED, module="megatron_lighthouse.pretrain_hybrid")
LIGHTHOUSE = ["--attention", "lighthouse"]
PATTERN = ["--hybrid-layer-pattern", "*-*-*-*-"]
GATED = ["--attention-output-gate"]
"""As Qwen3-Next has it."""

LAYOUTS = {
    "TP2+SP, in tiles": (2, PATTERN, "--tensor-model-parallel-size 2 --sequence-parallel --loss-tile-tokens 48"),
    "PP2": (2, ["--hybrid-layer-pattern", "*-*-|*-*-"], "--pipeline-model-parallel-size 2"),
    "PP2, embedding and loss alone": (2, ["--hybrid-layer-pattern", "|*-*-|*-*-|"], "--pipeline-model-parallel-size 2"),
    "CP2": (2, PATTERN, "--context-parallel-size 2"),
    "DP2, recompute": (2, PATTERN, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a GPT."""
    folder = tmp_path_factory.mktemp("start")
    save = ["--train-iters", "1", "--save", str(folder / "checkpoint"), "--save-interval", "1"]
    harness.run(folder, *LIGHTHOUSE, *GATED, *save)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Run:
    return harness.run(tmp_path_factory.mktemp("gpt"), *LIGHTHOUSE, *GATED, "--load", str(checkpoint), *START)


@pytest.mark.parametrize("layout", some_slow(LAYOUTS, {"CP2", "DP2, recompute", "PP2"}))
def test_the_layers_of_a_gpt_by_their_symbols_are_that_gpt(layout: str, tmp_path: Path, checkpoint: Path, gpt: Run) -> None:
    """From the GPT's checkpoint, against the GPT on one process. The middle two of its four attention layers are Lighthouse."""
    ranks, pattern, words = LAYOUTS[layout]
    start = [*LIGHTHOUSE, *GATED, "--load", str(checkpoint), *START]
    result = run(tmp_path, *start, *pattern, *words.split(), ranks=ranks)
    assert list(result.losses) == [1, 2, 3]
    assert_same(result, gpt)


@pytest.mark.slow
def test_windows_and_sinks_of_a_hybrid_are_those_of_a_gpt(tmp_path: Path) -> None:
    """The GPT's second and fourth layers see all tokens, of which the fourth is Lighthouse. Here numbers are of all symbols."""
    own = [
        *LIGHTHOUSE,
        *"--window-size 100,0 --softmax-type learnable --lighthouse-dense-last 0 --window-attn-skip-freq".split(),
    ]
    saved = str(tmp_path / "checkpoint")
    harness.run(tmp_path / "start", *own, "2", "--train-iters", "1", "--save", saved, "--save-interval", "1")
    load = ["--load", saved, *START]
    gpt = harness.run(tmp_path / "gpt", *own, "2", *load)
    layout = "--context-parallel-size 2".split()
    assert_same(run(tmp_path / "hybrid", *own, "[1,0,0,0,1,0,0,0]", *load, *PATTERN, *layout, ranks=2), gpt)


@pytest.mark.parametrize(
    "words", ["wall --position-embedding-type none", pytest.param("parallax --qk-layernorm", marks=pytest.mark.slow)]
)
def test_projections_of_a_hybrid_are_those_of_a_gpt(words: str, tmp_path: Path) -> None:
    """Those that an attention adds, in layers of *."""
    own, saved = ["--attention", *words.split()], str(tmp_path / "checkpoint")
    harness.run(tmp_path / "start", *own, "--train-iters", "1", "--save", saved, "--save-interval", "1")
    load = ["--load", saved, *START]
    gpt = harness.run(tmp_path / "gpt", *own, *load)
    assert_same(run(tmp_path / "hybrid", *own, *load, *PATTERN), gpt)


@pytest.mark.parametrize("kind", ["attention_layer", "mla_layer"])
def test_norms_of_a_local_stack_go_with_sequence_parallelism(kind: str) -> None:
    """Those of queries, keys and latents too, which Megatron's norm of torch refuses."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from megatron_lighthouse.mcore.attention.hybrid_specs import hybrid_stack

    asked = {"transformer_impl": "local", "sequence_parallel": True, "normalization": "RMSNorm", "qk_layernorm": True}
    plain = {"qk_l2_norm": False, "num_moe_experts": None, "moe_grouped_gemm": False}
    layer = getattr(hybrid_stack(Namespace(**asked, **plain)).submodules, kind).submodules
    norms = [layer.input_layernorm, *(x for name, x in vars(layer.self_attention.submodules).items() if "layernorm" in name)]
    assert len(norms) >= 3
    assert WrappedTorchNorm not in norms


def test_the_spec_makes_the_same_model(tmp_path: Path, checkpoint: Path, gpt: Run) -> None:
    """As Megatron-LM's own pretrain_hybrid.py takes it."""
    spec = ["--spec", "megatron_lighthouse.mcore.hybrid_spec", "lighthouse"]
    result = run(tmp_path, *spec, *PATTERN, *GATED, "--load", str(checkpoint), *START)
    assert_same(result, gpt)


@pytest.mark.parametrize("attention", [LIGHTHOUSE, ["--attention", "dense"]], ids=lambda words: words[1])
def test_norms_without_weights_are_in_a_gpt_too(attention: list[str], tmp_path: Path, checkpoint: Path, gpt: Run) -> None:
    """Megatron's own local layers of a GPT leave them out."""
    words = [*attention, *GATED, "--qk-l2-norm", "--load", str(checkpoint), *START]
    normed = harness.run(tmp_path / "gpt", *words)
    assert_same(run(tmp_path / "hybrid", *words, *PATTERN), normed)
    assert abs(normed.losses[1] - gpt.losses[1]) > 1e-3


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [("M-*-|ME*E", (3, 7)), ("*-*-/M*", (1, 3)), ("M-M-", ()), ("+E|+E", (1, 3)), (None, None)],
)
def test_attention_layers_are_counted_by_their_symbols(pattern: str | None, numbers: tuple[int, ...] | None) -> None:
    assert attention_layers(Namespace(hybrid_layer_pattern=pattern, num_layers=8)) == numbers


def arguments(**given: object) -> Namespace:
    base = {"hybrid_layer_pattern": "*-*-", "transformer_impl": "local", "position_embedding_type": "rope"}
    return Namespace(**{**base, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"hybrid_layer_pattern": "M-*-/M"},
            r"--hybrid-layer-pattern M-\*-/M with --transformer-impl local: of / M there are no",
        ),
        (
            {"dataloader_inter_document_masking": True, "hybrid_layer_pattern": "M*GE", "transformer_impl": "te"},
            r"document-masking with --hybrid-layer-pattern M\*GE: layers of G M do not .*layers of \* \+ - E alone",
        ),
        ({"use_rope_scaling": True}, "--use-rope-scaling is not heeded .* use --rotary-base"),
        ({"rotary_interleaved": True}, "--rotary-interleaved is half heeded"),
    ],
)
def test_what_does_not_go_with_a_pattern(given: dict[str, object], message: str) -> None:
    assert not [*hybrid.problems(arguments())]
    (problem,) = hybrid.problems(arguments(**given))
    assert re.search(message, problem)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"num_layers": 40},
            r"--num-layers 40 disagrees with --hybrid-layer-pattern \*-\*-, of 4 layers: leave --num-layers out",
        ),
        ({"hybrid_override_pattern": "*-"}, "--hybrid-override-pattern, its old name, exclude each other"),
        (
            {"hybrid_layer_pattern": None, "hybrid_override_pattern": "*-", "num_layers": 4},
            "with --hybrid-override-pattern .* of 2 layers",
        ),
        ({"hybrid_layer_pattern": "*-Q-"}, "Q is no symbol of a layer"),
        ({"hybrid_layer_pattern": "*-/*/*", "mtp_num_layers": 1}, "disagrees with .*, of 2 further tokens"),
        ({"hybrid_layer_pattern": "*-+-"}, r"has both \* and \+"),
        ({"hybrid_layer_pattern": "*|*||-", "pipeline_model_parallel_size": 2}, "a stage without layers between others"),
        ({"hybrid_layer_pattern": "/*-"}, r"/\*- names no layer: give one symbol a layer, before any /"),
        ({"hybrid_layer_pattern": "*-*-/"}, r"its parts behind / must be alike, .*: use \*-\*-/\*-, or leave"),
        ({"hybrid_layer_pattern": "*-*-/*-/*E", "num_experts": 4}, r"must be alike, .*: use \*-\*-/\*-/\*-, or leave"),
        ({"hybrid_layer_pattern": "*-*-/*|-"}, r"must be alike, of layers alone: use \*-\*-/\*-, or leave"),
        ({"hybrid_layer_pattern": "*E*-"}, "layers of E need --num-experts: add it, or use - in their place"),
        ({"num_experts": 4}, r"--num-experts 4 is of layers of E, and --hybrid-layer-pattern \*-\*- has none: leave it out"),
        ({"moe_layer_freq": 2}, "--moe-layer-freq 2 is not read with --hybrid-layer-pattern"),
        ({"mtp_hybrid_override_pattern": "*-"}, r"leave it out, and give --hybrid-layer-pattern /\*- for each token"),
        (
            {"hybrid_layer_pattern": "*-|*-", "pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 2},
            r"--decoder-first-pipeline-num-layers 2 does not go with .* \*-\|\*-, whose \| say what a stage has",
        ),
        ({"hybrid_layer_pattern": "*-|*-"}, "has 2 parts, .* use --pipeline-model-parallel-size 2, or leave"),
        ({"pipeline_model_parallel_size": 3}, "has 4 layers, which --pipeline-model-parallel-size 3 must divide"),
        ({"pipeline_model_parallel_layout": "Et*2|t*2L"}, "--pipeline-model-parallel-layout does not go with"),
    ],
)
def test_words_that_disagree_with_a_pattern(given: dict[str, object], message: str) -> None:
    base: dict[str, object] = {"hybrid_override_pattern": None, "num_layers": None, "pipeline_model_parallel_size": 1}
    base |= {"mtp_num_layers": None, "num_experts": None, "moe_layer_freq": 1, "mtp_hybrid_override_pattern": None}
    base |= dict.fromkeys((*hybrid.OF_PATTERN, "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"))
    assert not [*hybrid.word_problems(arguments(**base))]
    for pattern in ("*-|*-", "|*-*-", "|*-|*-|"):
        right = {"hybrid_layer_pattern": pattern, "pipeline_model_parallel_size": 2, "num_layers": 4}
        assert not [*hybrid.word_problems(arguments(**{**base, **right}))]
    (problem,) = hybrid.word_problems(arguments(**{**base, **given}))
    assert re.search(message, problem)


def test_stages_of_a_pattern_share_out_its_layers() -> None:
    """As those of a GPT do; where | parts it, nothing is left to share out."""

    def said(pattern: str, first: int, last: int | None = None) -> list[str]:
        of_stages = {"decoder_first_pipeline_num_layers": first, "decoder_last_pipeline_num_layers": last}
        plain = {"num_layers": len(pattern.replace("|", "")), "pipeline_model_parallel_layout": None}
        return [*stages(arguments(hybrid_layer_pattern=pattern, pipeline_model_parallel_size=2, **of_stages, **plain))]

    assert said("*-*-*-", 4) == said("*-*-*-", 4, 2) == said("*-|*-", 4, 4) == []
    (problem,) = said("*-*-*-", 2, 2)
    assert "2 of the 6 layers of --hybrid-layer-pattern are left to the 0 other stages" in problem
    assert "use --decoder-first-pipeline-num-layers 4." in problem


def test_the_symbols_are_megatrons() -> None:
    from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

    assert {*hybrid.LAYERS} == Symbols.VALID_LAYERS


def test_a_pattern_without_attention_takes_none(tmp_path: Path) -> None:
    problem = hybrid.attention_problem(arguments(hybrid_layer_pattern="M-M-"), "lighthouse")
    assert "none of its layers attends: use * or +" in str(problem)
    assert hybrid.attention_problem(arguments(), "lighthouse") is None


def test_layers_whose_package_is_not_there() -> None:
    found = [*hybrid.missing_packages(arguments(hybrid_layer_pattern="M-*-"))]
    assert found == [
        "--hybrid-layer-pattern: layers of M need the package mamba-ssm, which is not installed: pip install mamba-ssm."
    ]


def test_the_entry_point_asks_for_a_pattern(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_lighthouse import pretrain_hybrid

    monkeypatch.setattr("sys.argv", ["pretrain_hybrid", "--num-layers", "4"])
    with pytest.raises(SystemExit, match="2"):
        pretrain_hybrid.main()
    assert "--hybrid-layer-pattern is missing: give one symbol a layer" in capsys.readouterr().err


def test_a_copy_of_a_spec_can_be_changed_and_keeps_what_it_names() -> None:
    """Also where that is a mock of Transformer Engine's, which deepcopy does not take."""
    from megatron.core.transformer import ModuleSpec, TransformerLayer, TransformerLayerSubmodules

    def closure() -> object:
        return keys

    keys, mock = {"a.": "b."}, MagicMock(side_effect=closure)
    mock.method = closure.__closure__
    layer = ModuleSpec(TransformerLayer, submodules=TransformerLayerSubmodules(mlp=mock, sharded_state_dict_keys_map=keys))
    own = copied([layer, layer])
    assert own[0] is own[1] is not layer
    assert (own[0].module, own[0].submodules.mlp) == (TransformerLayer, mock)
    own[0].submodules.sharded_state_dict_keys_map["c."] = "d."
    own[0].submodules.mlp = None
    assert (layer.submodules.mlp, keys) == (mock, {"a.": "b."})
