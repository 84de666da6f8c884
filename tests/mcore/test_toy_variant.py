"""The seam: a variant in a folder and a line trains, with a stream, in any layout and from any checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from megatron_lighthouse.variant import Stream
from megatron_lighthouse.variants import VARIANTS, register
from tests.mcore.harness import MODEL, TEXT, Processes, Run, refused, run, some_slow
from tests.mcore.test_checkpoints import keys, save_interval
from tests.mcore.test_checks import problems
from tests.mcore.test_spec import N, gpt, local_spec, transformer_config
from tests.tolerances import assert_close
from tests.toy_variant.toy import TOY as TOY_VARIANT
from tests.toy_variant.toy import Toy, ToyConfig

TOY = "tests.toy_variant"
SAVED = 2
STREAM = "decoder.layers.self_attention.linear_r.weight"
"""Of all layers, in a checkpoint."""


def train(folder: Path, *options: str, attention: str = "toy", ranks: int = 1) -> Run:
    return run(folder, "--attention", attention, "--train-iters", "4", *options, ranks=ranks, module=TOY)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four iterations in one process, with a checkpoint of the second."""
    folder = tmp_path_factory.mktemp("toy")
    return train(folder, *save_interval(folder / "checkpoint", SAVED))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("dense")
    return train(folder, *save_interval(folder / "checkpoint", SAVED), "--exit-interval", str(SAVED), attention="dense")


def from_saved(run: Run) -> list[str]:
    return ["--load", str(run.folder / "checkpoint"), "--ckpt-step", str(SAVED)]


LAYOUTS = {
    "context": ("--context-parallel-size 2", 2),
    "heads": ("--context-parallel-size 2 --cp-comm-type a2a", 2),
    "sequence": ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
    "pipeline": ("--pipeline-model-parallel-size 2", 2),
    "recompute": ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", 1),
    "recompute of the core": ("--recompute-granularity selective --recompute-modules core_attn", 1),
}


@pytest.mark.parametrize("name", some_slow(LAYOUTS, {"context", "heads", "pipeline", "recompute", "recompute of the core"}))
def test_a_layout_changes_nothing(name: str, tmp_path: Path, whole: Run) -> None:
    """From the checkpoint: other layouts would draw other weights."""
    options, ranks = LAYOUTS[name]
    found = train(tmp_path, *options.split(), *from_saved(whole), ranks=ranks)
    assert list(found.losses) == [3, 4]
    assert_close(list(found.losses.values()), [whole.losses[3], whole.losses[4]], "parallel loss")
    norms = [[one.gradient_norms[iteration] for iteration in (3, 4)] for one in (found, whole)]
    assert_close(*norms, "parallel gradient norm")


def test_it_is_not_dense_attention(whole: Run, dense: Run) -> None:
    assert abs(whole.losses[1] - dense.losses[1]) > 1e-3
    assert STREAM in keys(whole.folder / "checkpoint", SAVED) - keys(dense.folder / "checkpoint", SAVED)


def test_a_resume_goes_on(tmp_path: Path, whole: Run) -> None:
    step = train(tmp_path, *from_saved(whole))
    assert step.losses == {iteration: whole.losses[iteration] for iteration in (3, 4)}


ANEW = "--no-load-optim"
SWITCH = {"dense": "toy", "toy": "dense"}


@pytest.mark.parametrize("before", SWITCH)
def test_the_optimizer_of_another_attention_is_refused(before: str, tmp_path: Path, whole: Run, dense: Run) -> None:
    options = ("--attention", SWITCH[before], "--train-iters", "4", *from_saved({"dense": dense, "toy": whole}[before]))
    log = refused(tmp_path, *options, module=TOY)
    assert f"is of --attention {before}, so that its optimizer knows other weights" in log
    assert f"add {ANEW}" in log


def test_from_dense_the_stream_begins_anew(tmp_path: Path, dense: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stream of zeros and one temperature it is the dense model, so that its loss is that of a dense run."""
    load = (*from_saved(dense), ANEW)
    expected = train(tmp_path / "dense", *load, attention="dense")
    monkeypatch.setenv("TOY_ZERO", "1")
    found = train(tmp_path / "toy", *load, "--toy-warmest", "1")
    assert found.losses[3] == pytest.approx(expected.losses[3], abs=1e-5)
    assert found.losses[4] != expected.losses[4], "the stream is not trained"
    assert f"has no {STREAM}: these begin anew" in found.log


def test_any_other_gap_is_refused(tmp_path: Path, dense: Run) -> None:
    options = ("--attention", "toy", "--train-iters", "4", *from_saved(dense), ANEW, "--add-qkv-bias")
    processes = Processes(tmp_path / "run", 1, [*MODEL, *options, *TEXT], TOY)
    assert processes.wait() != [0]
    log = processes.log.read_text(errors="replace")
    assert "self_attention.linear_qkv.bias" in log
    assert "iteration        3/" not in log


def test_to_dense_the_stream_is_dropped_by_name(tmp_path: Path, whole: Run) -> None:
    load = (*from_saved(whole), ANEW)
    found = train(tmp_path, *load, attention="dense")
    assert list(found.losses) == [3, 4]
    assert f"--attention dense has no {STREAM}: these of the checkpoint in" in found.log


def test_weights_that_go_with_no_other_attention(tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_ALONE", "1")
    load = (*from_saved(whole), ANEW)
    log = refused(tmp_path, "--attention", "dense", "--train-iters", "4", *load, module=TOY)
    assert "is of --attention toy, whose weights go with no other: use --attention toy" in log


@pytest.fixture
def toy() -> Iterator[LighthouseSettings]:
    register(TOY_VARIANT)
    yield LighthouseSettings(ToyConfig(), 0, 0, discard_output=False, variant=TOY_VARIANT.name)
    del VARIANTS[TOY_VARIANT.name]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window_size": (8, 0)}, "--window-size 8,0 is not done by --attention toy"),
        ({"attention_dropout": 0.1}, "--attention-dropout 0.1 is not done by --attention toy: use --attention-dropout 0"),
        ({"softmax_type": "learnable"}, "--softmax-type learnable is not done by --attention toy"),
        ({"fused_single_qkv_rope": True}, "fused_single_qkv_rope rotates q, k and v alone"),
        ({"qk_clip": True}, "--qk-clip rescales the rows of q and k alone"),
        ({"flash_decode": True}, "--flash-decode"),
        ({}, ""),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_stream(changes: dict[str, Any], says: str, megatron: None, toy: LighthouseSettings) -> None:
    found = problems(toy, **changes)
    assert says in found
    assert bool(says) == bool(found)


def test_a_norm_within_the_projection_is_refused(megatron: None, toy: LighthouseSettings) -> None:
    """As Transformer Engine's layer specs have it."""
    from megatron.core.transformer.identity_op import IdentityOp

    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    spec = local_spec()
    spec.submodules.input_layernorm = IdentityOp
    with pytest.raises(ValueError, match=r"reads a layer's normed input by linear_r, .* use --transformer-impl local"):
        with_lighthouse(spec, toy)


def test_a_stream_that_rope_must_not_rotate(megatron: None, toy: LighthouseSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of either kind come as they were projected, but for the rotation of the one."""
    import torch

    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse
    from megatron_lighthouse.mcore.attention.streams import apart

    streams = (Stream("g", rotated=False, paired=True), Stream("r"), Stream("gs", rotated=False, per_channel=False))
    monkeypatch.setattr(Toy, "streams", streams)
    model = gpt(with_lighthouse(local_spec(), toy), transformer_config(num_layers=1))
    attention, seen = model.decoder.layers[0].self_attention, {}
    for stream in streams:
        linear = getattr(attention, f"linear_{stream.name}")
        linear.register_forward_hook(lambda _, given, out, name=stream.name: seen.update({name: out[0]}))
    attention.core_attention.forward = lambda *rows, **_: seen.update(rows=rows) or rows[0][:, :, :4].flatten(2)
    model(torch.randint(64, (1, N)), torch.arange(N).unsqueeze(0), None)
    query, value, (g, r, gs) = apart(*seen["rows"][:3], 4, streams)
    assert (query.shape[2], value.shape[2]) == (4, 2)
    assert torch.equal(g, seen["g"].unflatten(-1, (4, 4)))
    assert torch.equal(gs, seen["gs"].unsqueeze(-1))
    projected = seen["r"].unflatten(-1, (4, 8))
    assert torch.equal(r[0], projected[0])
    assert (r[1:] - projected[1:]).abs().amax((1, 2, 3)).min() > 1e-3
