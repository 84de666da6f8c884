"""`--attention parallax` trains: any layout as one process, from and to dense checkpoints, and what cannot be by name."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from megatron_lighthouse.mcore.command_line.stored import is_zero
from megatron_lighthouse.parallax.config import ParallaxConfig
from megatron_lighthouse.plots import read_scalars
from tests.mcore.harness import Run, refused, run, some_slow
from tests.mcore.test_checkpoints import keys, save_interval
from tests.mcore.test_checks import problems
from tests.mcore.test_rotary import checkpoint
from tests.mcore.test_spec import N, gpt, local_spec, transformer_config
from tests.tolerances import assert_close

SAVED = 1
"""Other layouts would draw other weights, so all begin with this checkpoint, and take three steps."""
PROJECTION, NORM = (f"decoder.layers.self_attention.{name}.weight" for name in ("linear_r", "r_q_layernorm"))
SETTINGS = LighthouseSettings(ParallaxConfig(), 0, 0, discard_output=False, variant="parallax")


def train(folder: Path, *options: str, attention: str = "parallax", ranks: int = 1) -> Run:
    return run(folder, "--attention", attention, "--qk-layernorm", "--train-iters", "4", *options, ranks=ranks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four iterations in one process."""
    folder = tmp_path_factory.mktemp("parallax")
    log = ("--parallax-telemetry-interval", "2")
    return train(folder, *save_interval(folder / "checkpoint", SAVED), *log)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Likewise, with dense attention."""
    folder = tmp_path_factory.mktemp("dense")
    return train(folder, *save_interval(folder / "checkpoint", SAVED), attention="dense")


def from_saved(run: Run) -> list[str]:
    return ["--load", str(run.folder / "checkpoint"), "--ckpt-step", str(SAVED)]


TENSOR, CONTEXT, PIPELINE = "--tensor-model-parallel-size 2", "--context-parallel-size 2", "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "tensor": (TENSOR, 2),
    "pipeline": (f"{PIPELINE} --num-layers-per-virtual-pipeline-stage 1", 2),
    "context": (CONTEXT, 2),
    "tensor and context": (f"{TENSOR} {CONTEXT} --sequence-parallel", 4),
    "fewer key/value heads than ranks": ("--tensor-model-parallel-size 4", 4),
    "data": ("", 2),
    "recompute": ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", 1),
}
SLOW = ("tensor", "context", "pipeline", "fewer key/value heads than ranks", "data", "recompute")
"""The first two are tried together in `make test`."""


@pytest.mark.parametrize("name", some_slow(LAYOUTS, SLOW))
def test_a_layout_changes_nothing(name: str, tmp_path: Path, whole: Run) -> None:
    options, ranks = LAYOUTS[name]
    found = train(tmp_path, *options.split(), *from_saved(whole), ranks=ranks)
    assert list(found.losses) == [2, 3, 4]
    assert_close(list(found.losses.values()), [whole.losses[i] for i in (2, 3, 4)], "parallel loss")
    norms = [[one.gradient_norms[i] for i in (2, 3, 4)] for one in (found, whole)]
    assert_close(*norms, "parallel gradient norm")


def test_it_says_what_the_paper_found_of_adam(whole: Run, dense: Run) -> None:
    assert "parallax: --optimizer adam: the paper (arXiv 2605.29157) finds that Muon unlocks" in whole.log
    assert "nothing bounds" not in whole.log
    assert "Muon" not in dense.log
    assert {PROJECTION, NORM} <= keys(whole.folder / "checkpoint", SAVED) - keys(dense.folder / "checkpoint", SAVED)


def test_what_is_subtracted_is_logged(whole: Run) -> None:
    scalars = read_scalars(whole.folder / "tensorboard")
    for layer in range(1, 5):
        iterations, values = scalars[f"parallax/correction/layer-{layer}"]
        assert list(iterations) == [2, 4]
        assert all(0.05 < value < 20 for value in values)


ANEW = "--no-load-optim"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, dense: Run) -> Run:
    return train(tmp_path_factory.mktemp("converted"), *from_saved(dense), ANEW)


def test_a_dense_checkpoint_begins_as_it_was(tmp_path: Path, dense: Run, converted: Run) -> None:
    """With r = 0, by its norm's weight: and the next step moves that, by no more than the learning rate."""
    expected = train(tmp_path, *from_saved(dense), ANEW, attention="dense")
    assert converted.losses[2] == pytest.approx(expected.losses[2], abs=1e-5)
    assert converted.gradient_norms[2] > expected.gradient_norms[2], "r has no gradient"
    assert converted.losses[3] != expected.losses[3], "r is not trained"
    assert abs(converted.losses[3] - expected.losses[3]) < 0.05, "r has jumped"
    assert f"has no {PROJECTION}, {NORM}: these begin anew" in converted.log


def test_to_dense_is_refused_unless_asked_for(tmp_path: Path, whole: Run) -> None:
    load = ("--qk-layernorm", "--train-iters", "4", *from_saved(whole), ANEW)
    log = refused(tmp_path / "refused", "--attention", "dense", *load)
    assert "is of --attention parallax, whose weights go with no other: use --attention parallax, or add" in log
    found = train(tmp_path / "dropped", *from_saved(whole), ANEW, "--drop-attention-weights", attention="dense")
    assert list(found.losses) == [2, 3, 4]
    assert f"--attention dense has no {PROJECTION}, {NORM}: these of the checkpoint in" in found.log


@pytest.mark.parametrize(
    ("tensors", "zero"),
    [
        ({PROJECTION: torch.zeros(4, 6)}, True),
        ({PROJECTION: torch.tensor([0.0, 1e-30])}, False),
        ({"optimizer.state." + PROJECTION: torch.ones(2), PROJECTION: torch.zeros(2)}, True),
        ({"decoder.layers.self_attention.linear_qkv.weight": torch.zeros(2)}, False),
    ],
)
def test_a_projection_of_zeros_is_told_by_its_checkpoint(tensors: dict[str, Tensor], zero: bool, tmp_path: Path) -> None:
    dcp.save(tensors, checkpoint_id=str(tmp_path), no_dist=True)
    assert is_zero(tmp_path, "self_attention.linear_r.") is zero


def test_weights_to_begin_with_are_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lighthouse.mcore.command_line import resume

    monkeypatch.setattr(resume, "_is_zero", lambda *_: False)
    base, other = (Path(checkpoint(tmp_path / name, attention=name)) for name in ("parallax", "dense"))
    args = Namespace(attention="dense", ckpt_step=None, finetune=False, skip_train=True, no_load_optim=False)
    (problem,) = resume.problems(args, None, base)
    assert "is of --attention parallax, whose weights go with no other" in problem
    assert not [*resume.problems(args, other, base)]  # then --load counts


def test_a_parser_that_knows_no_attention_has_no_streams() -> None:
    """Megatron-LM's own, with --spec alone."""
    from megatron_lighthouse.mcore.loop import weights

    assert weights._lacking({"model": {"layers.0.self_attention.linear_r.weight": None}}, Namespace(), []) == []


@pytest.mark.usefixtures("megatron")
class TestLayers:
    def model(self, spec: Any, **changes: Any) -> Any:
        torch.manual_seed(3)
        return gpt(spec, transformer_config(num_layers=1, **changes))

    def test_a_model_with_biases_has_one_of_r(self) -> None:
        from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

        attention = self.model(with_lighthouse(local_spec(), SETTINGS), add_bias_linear=True).decoder.layers[0].self_attention
        assert attention.linear_r.bias.shape == (32,)
        assert not hasattr(attention, "r_q_layernorm")

    def test_transformer_engines_norm_stands_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stand-ins for its classes: weights keep the names of a dense checkpoint, and the model is that of the local spec."""
        from megatron.core.extensions import transformer_engine as engine
        from megatron.core.tensor_parallel import ColumnParallelLinear
        from megatron.core.transformer.identity_op import IdentityOp
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

        fused = type("TELayerNormColumnParallelLinear", (ColumnParallelLinear,), {})
        monkeypatch.setattr(engine, "TELayerNormColumnParallelLinear", fused)
        monkeypatch.setattr(engine, "TENorm", WrappedTorchNorm)
        monkeypatch.setattr(engine, "TEColumnParallelLinear", ColumnParallelLinear)
        given = local_spec()
        given.submodules.sharded_state_dict_keys_map.pop("input_layernorm.")
        given.submodules.input_layernorm = IdentityOp
        given.submodules.self_attention.submodules.linear_qkv = fused
        models = [self.model(with_lighthouse(spec, SETTINGS)) for spec in (given, local_spec())]
        found, expected = (
            {x.key for x in model.sharded_state_dict().values() if hasattr(x, "global_shape")} for model in models
        )
        assert found == expected
        assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in found
        tokens = torch.randint(64, (1, N))
        outputs = [model(tokens, torch.arange(N).unsqueeze(0), None) for model in models]
        assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window_size": (8, 0)}, "--window-size 8,0 is not done by --attention parallax"),
        ({"attention_dropout": 0.1}, "--attention-dropout 0.1 is not done by --attention parallax: use --attention-dropout 0"),
        ({"softmax_type": "learnable"}, "--softmax-type learnable is not done by --attention parallax"),
        ({"fused_single_qkv_rope": True}, "fused_single_qkv_rope rotates q, k and v alone"),
        ({"qk_clip": True}, "--qk-clip rescales the rows of q and k alone"),
        ({"flash_decode": True}, "--flash-decode"),
        ({}, ""),
    ],
    ids=str,
)
def test_what_does_not_go_with_it(changes: dict[str, Any], says: str, megatron: None) -> None:
    found = problems(SETTINGS, **changes)
    assert says in found
    assert bool(says) == bool(found)
