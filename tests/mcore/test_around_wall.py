"""Training with `--lighthouse-around wall`: any layout as one process, and from and to `--attention wall`, which stage 2 is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from megatron_lighthouse import lighthouse_attention
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.mcore.command_line import kept
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from megatron_lighthouse.recipe import two_stage
from megatron_lighthouse.variants import LIGHTHOUSE, WALL
from megatron_lighthouse.wall.config import WallConfig
from tests.mcore.harness import ROOT, Run, run, some_slow
from tests.mcore.test_checkpoints import keys, save_interval
from tests.mcore.test_checks import problems
from tests.mcore.test_packed import documents_of_rows, with_gradients
from tests.mcore.test_spec import N, fused_qkv, gpt, local_spec, transformer_config
from tests.mcore.test_wall import LAYOUTS, LOGGED, NONE, SINKS, WHOLE, from_saved, half_lives
from tests.tolerances import assert_close

AROUND = ("--attention", "lighthouse", "--lighthouse-around", "wall")
WALLS = ("--attention", "wall")


def train(folder: Path, *options: str, ranks: int = 1) -> Run:
    return run(folder, *NONE, *SINKS, *WHOLE, "--train-iters", "4", *options, ranks=ranks)


@pytest.fixture(scope="module")
def wall(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One iteration of `--attention wall`, with scalar gates and sinks: what all begin with."""
    folder = tmp_path_factory.mktemp("wall")
    return train(folder, *WALLS, *save_interval(folder / "checkpoint", 1), "--exit-interval", "1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, wall: Run) -> Run:
    """Three iterations around it in one process, of which the first is saved."""
    folder = tmp_path_factory.mktemp("around")
    return train(folder, *AROUND, *LOGGED, *from_saved(wall), *save_interval(folder / "checkpoint", 2))


@pytest.mark.parametrize("name", some_slow(["tensor", "pipeline", "context", "data"], {"tensor", "pipeline", "data"}))
def test_a_layout_changes_nothing(name: str, tmp_path: Path, wall: Run, whole: Run) -> None:
    """Two tiles over four chunks: context-parallel ranks deal rows."""
    options, ranks = LAYOUTS[name]
    found = train(tmp_path, *AROUND, *LOGGED, *options.split(), *from_saved(wall), ranks=ranks)
    assert list(found.losses) == [2, 3, 4]
    assert_close(list(found.losses.values()), list(whole.losses.values()), "parallel loss")
    assert_close(list(found.gradient_norms.values()), list(whole.gradient_norms.values()), "parallel gradient norm")
    lives, expected = (half_lives(one, 4) for one in (found, whole))
    assert lives.keys() == expected.keys()
    assert len(lives) == 4 * 4 * 3  # layers at the ends are plain Wall
    assert_close([lives[name] for name in expected], [*expected.values()], "parallel half-life")


def test_stage_2_is_wall(tmp_path: Path, wall: Run, whole: Run) -> None:
    """In one job, and in two with the same optimizer: the same losses, to the bit."""
    switched = train(tmp_path / "switched", *AROUND, "--lighthouse-stage2-at", "2", *from_saved(wall))
    saved = ("--load", str(whole.folder / "checkpoint"), "--ckpt-step", "2")
    second = train(tmp_path / "second", *WALLS, *saved)
    assert list(second.losses) == [3, 4]
    assert {2: whole.losses[2], **second.losses} == switched.losses
    assert second.losses[3] != whole.losses[3], "stage 1 does not select"
    assert "begin anew" not in whole.log + second.log
    assert keys(wall.folder / "checkpoint", 1) == keys(whole.folder / "checkpoint", 2)


def test_make_train_gives_both_stages_no_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, str | None] = {}

    def refuse(words: list[str], *_: object) -> list[str]:
        asked[words[1]] = kept.value(words, "--position-embedding-type")
        return ["enough is known"]

    monkeypatch.setattr(two_stage, "_problems", refuse)
    assert two_stage.main(["--runs", str(tmp_path), *AROUND, "--data", str(ROOT / "LICENSE")])
    assert asked == {"lighthouse": "none", "wall": "none"}


def settings(**changes: Any) -> LighthouseSettings:
    config = LighthouseConfig(levels=3, pooling=2, budget=4, tile_budget=2, around="wall")
    return LighthouseSettings(config, 1, 1, rope="mean", around=WallConfig(**changes))


@pytest.mark.usefixtures("megatron")
def test_the_ends_of_the_model_are_wall() -> None:
    """Every layer has gates, and learns them."""
    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    model = gpt(with_lighthouse(local_spec(), settings(tied_gates=True)), transformer_config(num_layers=4))
    torch.manual_seed(3)
    model(torch.randint(64, (1, N)), torch.arange(N).unsqueeze(0), None).sum().backward()
    layers = [layer.self_attention for layer in model.decoder.layers]
    assert [layer.core_attention.variant for layer in layers] == [WALL, LIGHTHOUSE, LIGHTHOUSE, WALL]
    assert all(layer.linear_g.weight.shape[0] == 16 and layer.linear_g.weight.grad.any() for layer in layers)


@pytest.mark.usefixtures("megatron")
def test_packed_documents_are_as_the_library_has_them() -> None:
    """Of two rows, with gradients, of the logits of gates."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse
    from megatron_lighthouse.mcore.attention.packed import packed

    own = settings(gate_max=0.5)
    model = gpt(with_lighthouse(local_spec(), own), transformer_config(num_layers=4))
    layer = model.decoder.layers[1].self_attention.core_attention
    query, key, value = fused_qkv(2, torch.float64)
    logits = torch.randn_like(query).requires_grad_()
    given = {"attn_mask_type": AttnMaskType.causal, "packed_seq_params": packed(documents_of_rows(), N)}
    out = layer(query, key, torch.cat([value, logits], 2), None, **given)
    gate = 0.5 * torch.expm1(logsigmoid(logits) / 0.5)
    rows = (x.transpose(0, 1).flatten(0, 1).unsqueeze(1) for x in (query, key, value, gate))
    row_q, row_k, row_v, row_g = rows
    bounds = documents_of_rows().cu_seqlens
    expected = lighthouse_attention(row_q, row_k, row_v, own.config, streams=[row_g], cu_seqlens=bounds)
    expected = expected.view(2, N, -1).transpose(0, 1)
    inputs = [query, logits, key, value]
    for a, b in zip(with_gradients(out, inputs), with_gradients(expected, inputs), strict=True):
        assert_close(a, b, "float64")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window_size": (8, 0), "window_attn_skip_freq": 2}, "--window-size 8,0 is not done by --lighthouse-around wall"),
        ({"qk_clip": True}, "--qk-clip rescales the rows of q and k alone"),
        ({"softmax_type": "learnable"}, ""),
    ],
    ids=str,
)
def test_what_does_not_go_with_it(changes: dict[str, Any], says: str, megatron: None) -> None:
    found = problems(settings(), **changes)
    assert says in found
    assert bool(says) == bool(found)


@pytest.mark.parametrize("kind", ["rope", "none"])
def test_positions_are_refused(kind: str, megatron: None) -> None:
    from argparse import Namespace

    from megatron_lighthouse.mcore.command_line.checks import check_run

    args = Namespace(seq_length=256, transformer_impl="local", load=None, position_embedding_type=kind)
    if kind == "none":
        return check_run(args, transformer_config(num_layers=4), settings())
    with pytest.raises(ValueError, match=f"--position-embedding-type {kind} does not go with --lighthouse-around wall"):
        check_run(args, transformer_config(num_layers=4), settings())
