"""`--attention wall` trains: any layout as one process, from and to dense checkpoints, and what cannot be by name."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from megatron_lighthouse.plots import read_scalars
from megatron_lighthouse.variants import WALL
from megatron_lighthouse.wall.config import WallConfig
from tests.mcore.harness import Run, refused, run, some_slow
from tests.mcore.test_checkpoints import keys, save_interval
from tests.mcore.test_checks import problems
from tests.mcore.test_spec import N, gpt, local_spec, transformer_config
from tests.tolerances import assert_close

SAVED = 1
"""Other layouts would draw other weights, so all begin with this checkpoint, and take three steps."""
NONE, SINKS = ("--position-embedding-type", "none"), ("--softmax-type", "learnable")
ANEW = "--no-load-optim"
GATE, BIAS, SCALAR = (f"decoder.layers.self_attention.linear_{name}" for name in ("g.weight", "g.bias", "gs.weight"))


def settings(**changes: Any) -> LighthouseSettings:
    return LighthouseSettings(WallConfig(**changes), 0, 0, discard_output=False, variant="wall")


def train(folder: Path, *options: str, attention: str = "wall", ranks: int = 1) -> Run:
    return run(folder, "--attention", attention, *NONE, *SINKS, "--train-iters", "4", *options, ranks=ranks)


WHOLE = ("--wall-scalar-gate", "--wall-gate-bias", "3", "--wall-gate-max", "0.86")
"""With gates that matter at 256 tokens. All runs have sinks."""
LOGGED = ("--wall-telemetry-interval", "2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four iterations in one process."""
    folder = tmp_path_factory.mktemp("wall")
    return train(folder, *save_interval(folder / "checkpoint", SAVED), *WHOLE, *LOGGED)


def half_lives(run: Run, iteration: int) -> dict[str, float]:
    """What was logged of gates in that iteration."""
    scalars = read_scalars(run.folder / "tensorboard")
    return {
        name: float(values[list(steps).index(iteration)])
        for name, (steps, values) in scalars.items()
        if name.startswith("wall/half-life/")
    }


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("dense")
    options = (*save_interval(folder / "checkpoint", SAVED), "--exit-interval", str(SAVED))
    return train(folder, *options, attention="dense")


def from_saved(run: Run) -> list[str]:
    return ["--load", str(run.folder / "checkpoint"), "--ckpt-step", str(SAVED)]


TENSOR, CONTEXT, PIPELINE = "--tensor-model-parallel-size 2", "--context-parallel-size 2", "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "tensor": (f"{TENSOR} --sequence-parallel", 2),
    "pipeline": (f"{PIPELINE} --num-layers-per-virtual-pipeline-stage 1", 2),
    "context": (CONTEXT, 2),
    "heads": (f"{CONTEXT} --cp-comm-type a2a", 2),
    "tensor and context": (f"{TENSOR} {CONTEXT}", 4),
    "fewer key/value heads than ranks": ("--tensor-model-parallel-size 4 --sequence-parallel", 4),
    "data": ("", 2),
    "recompute": ("--recompute-granularity selective --recompute-modules core_attn", 1),
}
SLOW = ("pipeline", "heads", "tensor and context", "fewer key/value heads than ranks", "data")
"""What is asked of these is not Wall's own, or is asked of it apart."""


@pytest.mark.parametrize("name", some_slow(LAYOUTS, SLOW))
def test_a_layout_changes_nothing(name: str, tmp_path: Path, whole: Run) -> None:
    options, ranks = LAYOUTS[name]
    found = train(tmp_path, *options.split(), *WHOLE, *LOGGED, *from_saved(whole), ranks=ranks)
    assert list(found.losses) == [2, 3, 4]
    assert_close(list(found.losses.values()), [whole.losses[i] for i in (2, 3, 4)], "parallel loss")
    norms = [[one.gradient_norms[i] for i in (2, 3, 4)] for one in (found, whole)]
    assert_close(*norms, "parallel gradient norm")
    for iteration in (2, 4):
        lives, expected = (half_lives(one, iteration) for one in (found, whole))
        assert lives.keys() == expected.keys()
        assert_close([lives[name] for name in expected], [*expected.values()], "parallel half-life")


def test_half_lives_are_logged_and_drawn(whole: Run) -> None:
    """Of gates whose bias is 3, by layer and head: about 14 tokens. Weights spread them."""
    found = half_lives(whole, 4)
    assert {name.rpartition("/")[0] for name in found} == {
        f"wall/half-life/layer-{layer}/head-{head}" for layer in range(1, 5) for head in range(4)
    }
    for name in found:
        if name.endswith("p50"):
            low, middle, high = (found[name.replace("p50", one)] for one in ("p25", "p50", "p75"))
            assert 5 < low < middle < high < 40
    assert (whole.folder / "tensorboard" / "half-life.png").stat().st_size > 1000


def test_a_checkpoint_names_its_gates(whole: Run, dense: Run) -> None:
    of_wall, of_dense = (keys(one.folder / "checkpoint", SAVED) for one in (whole, dense))
    assert of_wall - of_dense >= {GATE, BIAS, SCALAR}
    says = "at first a channel fades to 1/e in 21 tokens, and to 4e-06 over --seq-length 256"
    assert f"wall: --wall-gate-bias 3: {says}" in whole.log


def test_from_dense_gates_begin_near_none(tmp_path: Path, dense: Run) -> None:
    """With a large bias it is the dense model without positions, and then its gates are trained."""
    options = (*from_saved(dense), ANEW)
    expected = train(tmp_path / "dense", *options, attention="dense")
    found = train(tmp_path / "wall", *options, "--wall-gate-bias", "14")
    assert found.losses[2] == pytest.approx(expected.losses[2], abs=1e-3)
    assert found.losses[2] != expected.losses[2]
    assert f"has no {BIAS}, {GATE}: these begin anew" in found.log


def test_to_dense_gates_are_lost_by_name_alone(tmp_path: Path, whole: Run) -> None:
    given = ("--attention", "dense", *NONE, *SINKS, "--train-iters", "2", *from_saved(whole))
    log = refused(tmp_path, *given, ANEW)
    assert "is of --attention wall, whose weights go with no other: use --attention wall, or add" in log
    assert "--drop-attention-weights to lose linear_g, linear_gs" in log


@pytest.mark.usefixtures("megatron")
class TestLayers:
    def attention(self, model: dict[str, Any] | None = None, **changes: Any) -> Any:
        from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

        torch.manual_seed(3)
        made = gpt(with_lighthouse(local_spec(), settings(**changes)), transformer_config(num_layers=1, **(model or {})))
        tokens = torch.randint(64, (1, N))
        made(tokens, torch.arange(N).unsqueeze(0), None).sum().backward()
        attention = made.decoder.layers[0].self_attention
        assert all(parameter.grad.any() for name, parameter in attention.named_parameters() if "linear_g" in name)
        return attention

    def test_gates_shared_by_a_group_are_as_many_as_keys(self) -> None:
        heads, tied = (self.attention(tied_gates=tied).linear_g for tied in (False, True))
        assert heads.weight.shape[0] == 32
        assert tied.weight.shape[0] == 16

    def test_sinks_are_those_of_the_model(self) -> None:
        sink = self.attention({"softmax_type": "learnable"}).core_attention.softmax_offset
        assert sink.shape == (4,)
        assert sink.grad.all()

    def test_the_bias_begins_as_asked(self) -> None:
        attention = self.attention(gate_bias=5.0, scalar_gate=True)
        assert torch.equal(attention.linear_g.bias, torch.full((32,), 5.0))
        assert torch.equal(attention.linear_gs.bias, torch.full((attention.linear_gs.weight.shape[0],), 5.0))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window_size": (8, 1)}, "--window-size 8,1 must be n,0 with --attention wall"),
        ({"window_size": (-1, 0)}, "--window-size -1,0 must be n,0 with --attention wall"),
        ({"window_size": (0, 0)}, ""),
        ({"transformer_impl": "transformer_engine", "context_parallel_size": 2, "window_size": (8, 0)}, ""),
        ({"attention_dropout": 0.1}, "--attention-dropout 0.1 is not done by --attention wall: use --attention-dropout 0"),
        ({"fused_single_qkv_rope": True}, "fused_single_qkv_rope rotates q, k and v alone"),
        ({"qk_clip": True}, "--qk-clip rescales the rows of q and k alone"),
        ({"flash_decode": True}, "--flash-decode"),
        ({"softmax_type": "learnable"}, ""),
        ({}, ""),
    ],
    ids=str,
)
def test_what_does_not_go_with_it(changes: dict[str, Any], says: str, megatron: None) -> None:
    found = problems(settings(), **changes)
    assert says in found
    assert bool(says) == bool(found)


@pytest.mark.parametrize(
    ("tied", "groups", "says"),
    [
        (False, 2, ""),
        (True, 2, "--wall-tied-gates has gates of --num-query-groups 2, fewer than --tensor-model-parallel-size 4"),
        (False, 3, "--num-query-groups 3 must be a multiple of --tensor-model-parallel-size 4"),
    ],
)
def test_ranks_with_the_same_key_value_head(tied: bool, groups: int, says: str, megatron: None) -> None:
    model = Namespace(num_attention_heads=12, num_query_groups=groups, tensor_model_parallel_size=4)
    model.attention_dropout, model.window_size = 0.0, None
    found = "".join(WALL.problems(WallConfig(tied_gates=tied), model))
    assert says in found
    assert bool(says) == bool(found)


@pytest.mark.parametrize(("kernels", "fp16"), [("triton", True), ("triton", False), ("auto", True), ("reference", True)])
@pytest.mark.parametrize("around", [False, True], ids=["", "around"])
def test_its_kernels_are_refused_in_fp16(kernels: str, fp16: bool, around: bool, megatron: None) -> None:
    given = settings(kernels=kernels)
    if around:
        lighthouse = LighthouseConfig(levels=2, pooling=4, budget=16, tile_budget=8, around="wall")
        given = LighthouseSettings(lighthouse, 0, 0, discard_output=False, around=given.config)
    found = problems(given, fp16=fp16)
    assert bool(found) == (fp16 and kernels == "triton"), found
    if found:
        assert "--wall-kernels triton cannot run: in fp16 their gradients were wrong on an H200 (bf16 works)" in found


@pytest.mark.parametrize("kind", ["rope", "learned_absolute", "none"])
def test_positions_are_refused(kind: str, megatron: None) -> None:
    from megatron_lighthouse.mcore.command_line.checks import check_run

    args = Namespace(seq_length=256, transformer_impl="local", load=None, position_embedding_type=kind)
    if kind == "none":
        return check_run(args, transformer_config(), settings())
    with pytest.raises(ValueError, match=f"--position-embedding-type {kind} does not go with --attention wall"):
        check_run(args, transformer_config(), settings())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kernels": "fast"}, "--wall-kernels fast is not known"),
        ({"gate_bias": float("nan")}, "--wall-gate-bias nan must lie between -40 and 40"),
        ({"gate_max": -1.0}, "--wall-gate-max -1.0 must be positive, or 0 for none"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WallConfig(**changes)
