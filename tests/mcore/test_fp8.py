"""FP8 attention: what is refused and what is not, and on which GPUs."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.mcore.command_line import fp8
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from megatron_lighthouse.variants import VARIANTS
from tests.mcore.harness import ROOT
from tests.mcore.test_checks import problems
from tests.mcore.test_spec import transformer_config

pytestmark = pytest.mark.usefixtures("megatron")

ENGINE = {"transformer_impl": "transformer_engine"}
ASKED: dict[str, Any] = {**ENGINE, "fp8": "hybrid", "fp8_recipe": "delayed", "fp8_dot_product_attention": True}
WALL: Any = VARIANTS["wall"].config
TENSORWISE = {**ASKED, "fp8_recipe": "tensorwise"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (fp8.RECIPE, fp8.UNPICKLE, "NVTE_FUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("changes", "named", "advice"),
    [
        ({"fp8": None}, "--fp8-format alone", "add --fp8-format hybrid"),
        ({"transformer_impl": "local"}, "Transformer Engine's attention", "use --transformer-impl transformer_engine"),
        ({"fp8_recipe": "tensorwise"}, "--fp8-recipe tensorwise", "NVTE_DPA_FP8_RECIPE=DelayedScaling"),
        ({"fp8_recipe": "blockwise"}, "--fp8-recipe blockwise", "use --fp8-recipe delayed"),
        ({"fp8_recipe": "mxfp8"}, "--fp8-recipe mxfp8", "use --fp8-recipe delayed"),
        ({"softmax_type": "off-by-one"}, "--softmax-type off-by-one", "leave one of them out"),
        ({"window_size": (128, 0), "window_attn_skip_freq": 2}, "--window-size 128,0", "leave one of them out"),
        ({"attention_backend": SimpleNamespace(name="flash")}, "--attention-backend flash", "use fused or auto"),
        ({"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}, "core_attn", "full"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local", "leave one of them out"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1: checkpoints would not hold", "leave one of them out"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], named: str, advice: str) -> None:
    message = problems(**{**ASKED, **changes})
    assert message.count("--fp8-dot-product-attention") == 1
    assert named in message
    assert advice in message
    dense = transformer_config()
    vars(dense).update({**ASKED, **changes})
    assert [*fp8.problems(dense)] == [message.splitlines()[1].removeprefix("  - ")]


@pytest.mark.parametrize(
    ("asked", "environment"),
    [
        (ASKED, {}),
        (ASKED, {fp8.RECIPE: "DelayedScaling"}),
        (TENSORWISE, {fp8.RECIPE: "DelayedScaling"}),
        ({**ASKED, "recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, {}),
        ({**ASKED, "recompute_granularity": "full"}, {}),
        ({**ASKED, "context_parallel_size": 2}, {}),
        ({**ENGINE, "fp8": "hybrid", "fp8_recipe": "blockwise"}, {fp8.RECIPE: "F16"}),
    ],
    ids=str,
)
def test_what_is_taken(asked: dict[str, Any], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert problems(**asked) == ""


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        (fp8.RECIPE, "F16", "set NVTE_DPA_FP8_RECIPE=DelayedScaling"),
        (fp8.RECIPE, "Float8CurrentScaling", "set NVTE_DPA_FP8_RECIPE=DelayedScaling"),
        ("NVTE_FUSED_ATTN", "0", "unset it"),
    ],
)
def test_an_environment_in_which_attention_would_not_be_in_fp8(
    name: str, value: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    message = problems(**ASKED)
    assert f"{name}={value}" in message
    assert advice in message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (LighthouseSettings(LighthouseConfig(budget=8, tile_budget=4, inner="fa4")), "--lighthouse-inner fa4 takes another"),
        (
            LighthouseSettings(LighthouseConfig(budget=8, tile_budget=4, around="wall"), around=WALL()),
            "--lighthouse-around wall does not call",
        ),
        *(
            (LighthouseSettings(VARIANTS[name].config(), variant=name), f"--attention {name} does not call")  # type: ignore[misc]
            for name in ("parallax", "wall")
        ),
    ],
    ids=["inner", "around", "parallax", "wall"],
)
def test_attention_that_is_not_the_engines(settings: LighthouseSettings, said: str) -> None:
    assert said in problems(settings, **ASKED)


def test_documents_are_refused() -> None:
    config, args = Namespace(**ASKED), Namespace(dataloader_inter_document_masking=True, save=None, load=None)
    (problem,) = fp8.run_problems(args, config)
    assert "--dataloader-inter-document-masking" in problem
    args.dataloader_inter_document_masking = False
    assert [*fp8.run_problems(args, config)] == []


@pytest.mark.parametrize("asks", [True, False], ids=["an engine that asks", "one that does not"])
@pytest.mark.parametrize(
    ("config", "pickles"),
    [
        (ASKED, True),
        (TENSORWISE, True),
        ({**ASKED, "fp8_dot_product_attention": False}, True),
        ({**TENSORWISE, "fp8_dot_product_attention": False}, False),
        ({**ASKED, "fp8": None, "fp8_dot_product_attention": False}, False),
    ],
    ids=["delayed", "delayed in attention", "delayed in linear layers", "current", "bf16"],
)
def test_a_checkpoint_that_could_not_be_loaded(
    config: dict[str, Any], pickles: bool, asks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asks:
        (tmp_path / "pytorch").mkdir()
        (tmp_path / "pytorch" / "_extra_state.py").touch()
    monkeypatch.setattr(fp8, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    args = Namespace(dataloader_inter_document_masking=False, save="there", load=None)
    found = [*fp8.run_problems(args, Namespace(**config))]
    assert len(found) == (pickles and asks)
    assert all(f"set {fp8.UNPICKLE}=1" in problem for problem in found)
    monkeypatch.setenv(fp8.UNPICKLE, "1")
    assert [*fp8.run_problems(args, Namespace(**config))] == []


@pytest.mark.parametrize(
    ("major", "channels", "cudnn", "deterministic", "said"),
    [
        (0, 128, None, False, "there is none here"),
        (8, 128, 92000, False, "these are of 8"),
        (12, 128, 92000, False, "these are of 12"),
        (9, 64, None, False, "takes heads of 128 channels, and these have 64"),
        (9, 128, 90600, False, "needs cuDNN 9.7, and this is 90600"),
        (9, 128, 91800, True, "with --deterministic-mode needs cuDNN 9.19, and this is 91800"),
        (10, 192, None, False, "up to 128 channels, a multiple of 16, and these have 192"),
        (10, 40, None, False, "a multiple of 16, and these have 40"),
        (9, 128, 91900, True, None),
        (9, 128, None, False, None),
        (10, 64, 91800, False, None),
    ],
)
def test_gpus(major: int, channels: int, cudnn: int | None, deterministic: bool, said: str | None) -> None:
    config = Namespace(
        **{**ASKED, "hidden_size": 256, "num_attention_heads": 2, "kv_channels": channels, "deterministic_mode": deterministic}
    )
    found = [*fp8.device_problems(config, major, cudnn)]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
    config.fp8_dot_product_attention = False
    assert [*fp8.device_problems(config, major, cudnn)] == []


def test_heads_of_latent_attention_are_refused() -> None:
    sizes = {"qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128, "hidden_size": 256, "num_attention_heads": 2}
    config = Namespace(**ASKED, **sizes, multi_latent_attention=True)
    (problem,) = fp8.device_problems(config, 9)
    assert "these have 192 and values of 128" in problem
    (newest,) = fp8.device_problems(config, 10)
    for said in (problem, newest):
        assert "use --qk-head-dim 64 --qk-pos-emb-head-dim 64 --v-head-dim 128, or leave it out" in said
    vars(config).update(qk_head_dim=64, qk_pos_emb_head_dim=64, v_head_dim=128)
    assert not [*fp8.device_problems(config, 9), *fp8.device_problems(config, 10)]


def test_a_model_is_refused_where_the_gpus_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lighthouse.mcore.attention import layer_specs

    config = transformer_config()
    vars(config).update(ASKED)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"needs GPUs of compute capability 9 or 10, and there is none here"):
            layer_specs._check_fp8(config)
    vars(config).update(fp8_dot_product_attention=False)
    layer_specs._check_fp8(config)
    vars(config).update(fp8_recipe="mxfp8")  # of layers alone: Transformer Engine says it in the first step
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(layer_specs, "capability_of", lambda device: 90)
    with pytest.raises(ValueError, match="--fp8-recipe mxfp8 needs Blackwell's GPUs"):
        layer_specs._check_fp8(config)


def test_the_flag() -> None:
    """Megatron has the setting, and no flag: where it gets one, ours must not stand in its way."""
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    from megatron_lighthouse.mcore.command_line.entry import with_all_arguments

    parser = with_all_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    assert parser.parse_args([fp8.FLAG]).fp8_dot_product_attention
    assert not parser.parse_args([]).fp8_dot_product_attention
    assert fp8.add_arguments(parser) is parser


def test_the_run_is_told_what_training_in_it_gave() -> None:
    found = json.loads((ROOT / "benchmarks/results/fp8/train.json").read_text())
    from_bf16, linear = (abs(found["above bf16"][run]) for run in ("FP8 attention too", "FP8 linear layers"))
    assert not found["held"]
    assert f"it was {from_bf16:.3f} nats from bf16's loss, where {found['nats allowed']} was the bar" in fp8.EXPERIMENTAL
    assert f"{abs(from_bf16 - linear):.3f} from that of FP8 linear layers alone" in fp8.EXPERIMENTAL
