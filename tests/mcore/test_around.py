"""Training with `--lighthouse-around parallax`: any layout as one process, and stage 2 is `--attention parallax`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_lighthouse import lighthouse_attention
from megatron_lighthouse.launch import check
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.mcore.attention.core_attention import VariantMixin
from megatron_lighthouse.mcore.command_line import resume
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from megatron_lighthouse.mcore.command_line.stored import common_state
from megatron_lighthouse.parallax.attention import parallax_attention
from megatron_lighthouse.parallax.config import ParallaxConfig
from megatron_lighthouse.plots import read_scalars
from megatron_lighthouse.recipe.which_attention import settle_attention
from megatron_lighthouse.variants import DENSE, LIGHTHOUSE, PARALLAX, base_in, named_in
from tests.mcore.harness import Run, run, some_slow
from tests.mcore.test_checkpoints import keys, save_interval
from tests.mcore.test_checks import problems
from tests.mcore.test_launch_check import GPUS, LLAMA
from tests.mcore.test_packed import documents_of_rows, each_alone, with_gradients
from tests.mcore.test_parallax import PROJECTION
from tests.mcore.test_spec import N, fused_qkv, gpt, local_spec, transformer_config
from tests.tolerances import assert_close

SAVED = 1
AROUND = ("--attention", "lighthouse", "--lighthouse-around", "parallax")
SETTINGS = LighthouseSettings(
    LighthouseConfig(levels=3, pooling=2, budget=4, tile_budget=2, around="parallax"),
    1,
    1,
    rope="mean",
    around=ParallaxConfig(),
)


def train(folder: Path, *options: str, ranks: int = 1) -> Run:
    return run(folder, "--train-iters", "4", *options, ranks=ranks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four iterations in one process."""
    folder = tmp_path_factory.mktemp("around")
    log = ("--parallax-telemetry-interval", "2")
    return train(folder, *AROUND, *save_interval(folder / "checkpoint", SAVED), *log)


def from_saved(run: Run) -> list[str]:
    return ["--load", str(run.folder / "checkpoint"), "--ckpt-step", str(SAVED)]


TENSOR, CONTEXT = "--tensor-model-parallel-size", "--context-parallel-size"


@pytest.mark.parametrize("layout", some_slow([TENSOR, CONTEXT], {TENSOR}))
def test_a_layout_changes_nothing(layout: str, tmp_path: Path, whole: Run) -> None:
    """Two tiles over four chunks: context-parallel ranks deal rows."""
    found = train(tmp_path, *AROUND, layout, "2", *from_saved(whole), ranks=2)
    assert list(found.losses) == [2, 3, 4]
    assert_close(list(found.losses.values()), [whole.losses[i] for i in (2, 3, 4)], "parallel loss")
    norms = [[one.gradient_norms[i] for i in (2, 3, 4)] for one in (found, whole)]
    assert_close(*norms, "parallel gradient norm")


def test_stage_2_is_parallax(tmp_path: Path, whole: Run) -> None:
    """In one job, and in two with the same optimizer: the same losses, to the bit."""
    switched = train(tmp_path / "switched", *AROUND, "--lighthouse-stage2-at", str(SAVED), *from_saved(whole))
    second = train(tmp_path / "second", "--attention", "parallax", *from_saved(whole))
    assert list(second.losses) == [2, 3, 4]
    assert switched.losses == second.losses
    assert switched.losses[2] != whole.losses[2], "stage 1 does not select"
    assert "begin anew" not in second.log
    assert PROJECTION in keys(whole.folder / "checkpoint", SAVED)


def test_it_says_and_logs_what_parallax_does(whole: Run) -> None:
    assert "parallax: --optimizer adam: the paper (arXiv 2605.29157) finds that Muon unlocks" in whole.log
    assert "parallax: nothing bounds the products of r and keys without --qk-layernorm" in whole.log
    scalars = read_scalars(whole.folder / "tensorboard")
    for layer in range(1, 5):
        iterations, values = scalars[f"parallax/correction/layer-{layer}"]
        assert list(iterations) == [2, 4]
        assert all(0.01 < value < 20 for value in values)


@pytest.mark.usefixtures("megatron")
def test_the_ends_of_the_model_are_plain_parallax() -> None:
    """Every layer has the projection, and all are ours."""
    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    model = gpt(with_lighthouse(local_spec(), SETTINGS), transformer_config(num_layers=4))
    layers = [layer.self_attention for layer in model.decoder.layers]
    assert [layer.core_attention.variant for layer in layers] == [PARALLAX, LIGHTHOUSE, LIGHTHOUSE, PARALLAX]
    assert all(isinstance(layer.core_attention, VariantMixin) and layer.linear_r.weight.any() for layer in layers)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("number", [0, 1], ids=["plain", "around"])
def test_packed_documents_are_as_alone(number: int) -> None:
    """Of two rows, with gradients: the plain layer by one document after the other, and Lighthouse's as the library has it."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse
    from megatron_lighthouse.mcore.attention.packed import packed

    model = gpt(with_lighthouse(local_spec(), SETTINGS), transformer_config(num_layers=4))
    layer = model.decoder.layers[number].self_attention.core_attention
    query, key, value = fused_qkv(2, torch.float64)
    r = torch.randn_like(query).requires_grad_()
    inputs = [query, r, key, value]
    given = {"attn_mask_type": AttnMaskType.causal, "packed_seq_params": packed(documents_of_rows(), N)}
    out = layer(torch.cat([query, r], 2), key, value, None, **given)
    if number:
        row_q, row_r, row_k, row_v = (x.transpose(0, 1).flatten(0, 1).unsqueeze(1) for x in inputs)
        bounds = documents_of_rows().cu_seqlens
        expected = lighthouse_attention(row_q, row_k, row_v, SETTINGS.config, streams=[row_r], cu_seqlens=bounds)
        expected = expected.view(2, N, -1).transpose(0, 1)
    else:
        expected = each_alone(lambda q, s, k, v, mask: parallax_attention(q, s, k, v).flatten(2), inputs)
    for a, b in zip(with_gradients(out, inputs), with_gradients(expected, inputs), strict=True):
        assert_close(a, b, "float64")


GIVEN = {"attention": "lighthouse", "lighthouse_around": "parallax"}


def test_what_a_run_is_around_is_read_of_its_arguments() -> None:
    assert base_in(Namespace(**GIVEN)) is PARALLAX
    assert named_in(Namespace(**GIVEN)) == "lighthouse --lighthouse-around parallax"
    assert base_in(Namespace(attention="lighthouse")) is DENSE, "a checkpoint that is older than the argument"
    assert base_in(Namespace()) is DENSE
    assert base_in(Namespace(attention="from elsewhere")) is None


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        (GIVEN, {"attention": "parallax"}, ""),
        ({"attention": "parallax"}, GIVEN, ""),
        (
            GIVEN,
            {"attention": "lighthouse"},
            "is of --attention lighthouse --lighthouse-around parallax, whose weights go with no",
        ),
        (GIVEN, {"attention": "dense"}, "add --drop-attention-weights to lose linear_r"),
        (
            {"attention": "lighthouse"},
            GIVEN,
            "its optimizer knows other weights than --attention lighthouse --lighthouse-around",
        ),
    ],
)
def test_which_checkpoints_go_on(
    before: dict[str, str], now: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "_is_zero", lambda *_: False)
    args = Namespace(**now, skip_train=False, finetune=False, no_load_optim=False)
    found = "\n".join(resume.attention_problems(args, Namespace(**before), Path(), Path()))
    assert says in found
    assert bool(says) == bool(found)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fused_single_qkv_rope": True}, "fused_single_qkv_rope rotates q, k and v alone"),
        ({"qk_clip": True}, "--qk-clip rescales the rows of q and k alone"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1 makes layers that are to stay dense"),
        ({"window_size": (8, 0)}, "--window-size 8,0 makes all layers see a window alone"),
        (
            {"window_size": (8, 0), "window_attn_skip_freq": 2},
            "--window-size 8,0 is not done by --lighthouse-around parallax",
        ),
        ({"softmax_type": "learnable"}, "--softmax-type learnable is not done by --lighthouse-around parallax"),
        ({}, ""),
    ],
    ids=str,
)
def test_what_does_not_go_with_it(changes: dict[str, object], says: str, megatron: None) -> None:
    found = problems(SETTINGS, **changes)
    assert says in found
    assert bool(says) == bool(found)


def test_an_evaluation_after_the_switch_is_of_parallax(whole: Run) -> None:
    """By the arguments that the checkpoint holds."""
    args = (common_state(whole.folder / "checkpoint", SAVED) or {})["args"]
    args.lighthouse_stage2_at = SAVED
    settle_attention(args, SAVED + 1)
    assert (args.attention, args.lighthouse_layers) == ("parallax", 0)


def test_documents_over_ranks_are_refused_once_in_the_words_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Which has no --attention parallax."""
    words = "--lighthouse-around parallax --dataloader-inter-document-masking --transformer-impl local"
    assert check.main([*GPUS, "--without-megatron", "--", *LLAMA, *words.split()]) == 1
    assert (error := capsys.readouterr().err).count("--context-parallel-size 4 is not done") == 1, error
    assert "is not done with --lighthouse-around parallax: use --lighthouse-around softmax" in error
