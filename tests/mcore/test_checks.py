"""What is refused when the model is built: every rule, both ways, with an alternative that works."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from tests.mcore.harness import refused
from tests.mcore.test_selection_log import arguments
from tests.mcore.test_spec import transformer_config

pytestmark = pytest.mark.usefixtures("megatron")

GOOD = LighthouseSettings(LighthouseConfig(budget=8, tile_budget=4), dense_first=1, dense_last=1)


def problems(settings: LighthouseSettings = GOOD, seq_length: int | None = 256, **changes: Any) -> str:
    """The refusal of a model with these options; '' where it is accepted."""
    from megatron_lighthouse.mcore.command_line.checks import check

    config = transformer_config()
    for name, value in changes.items():  # set afterwards, for Megatron's own checks refuse some combinations first
        assert hasattr(config, name)
        setattr(config, name, value)
    try:
        check(config, settings, seq_length)
    except ValueError as error:
        return str(error)
    return ""


WINDOWS = {"window_size": (128, 0), "window_attn_skip_freq": 2, "transformer_impl": "transformer_engine"}
SINKS = {"softmax_type": "learnable", "transformer_impl": "transformer_engine"}
LOCAL_RANKS = {"context_parallel_size": 2, "transformer_impl": "local"}
REFUSED = [
    ({**LOCAL_RANKS, "cp_comm_type": "a2a+p2p"}, "--cp-comm-type a2a+p2p", "--transformer-impl transformer_engine"),
    ({**LOCAL_RANKS, "context_parallel_size": 4, "cp_comm_type": "a2a"}, "--cp-comm-type a2a", "--context-parallel-size 2"),
    (
        {**LOCAL_RANKS, "cuda_graph_impl": "transformer_engine"},
        "--cuda-graph-impl transformer_engine is not tried with --cp-comm-type p2p",
        "LIGHTHOUSE_COPY_ENGINE=0",
    ),
    (
        {**LOCAL_RANKS, "cuda_graph_impl": "local", "cp_comm_type": "all_gather"},
        "cannot capture rows that are dealt out to --context-parallel-size 2",
        "a multiple of 4 (such as 2)",
    ),
    ({"attention_dropout": 0.1}, "--attention-dropout 0.1", "--attention-dropout 0"),
    ({"window_size": (128, 0)}, "--window-size 128,0", "--window-attn-skip-freq N"),
    (
        {"window_size": (128, 0), "window_attn_skip_freq": [1] * 6},
        "--window-size 128,0 with --window-attn-skip-freq [1, 1, 1, 1, 1, 1] makes all layers see a window alone",
        "or a list, by which some that attend see all tokens",
    ),
    ({"window_size": (128, 0), "window_attn_skip_freq": [1, 0]}, "is of 2 layers, and --num-layers is 6", "one number a layer"),
    ({**WINDOWS, "context_parallel_size": 2}, "--window-size 128,0 with --cp-comm-type p2p", "a2a or all_gather"),
    (
        {**SINKS, "context_parallel_size": 2, "cp_comm_type": "all_gather"},
        "--softmax-type learnable with",
        "--cp-comm-type a2a",
    ),
    ({"qk_layernorm": True}, "--qk-layernorm", "--lighthouse-scorer mass, dilated or gla"),
    ({"qk_l2_norm": True}, "--qk-l2-norm", "leave it out"),
    ({"experimental_attention_variant": "dsa"}, "--experimental-attention-variant dsa", "use one or the other"),
    ({"transformer_impl": "inference_optimized"}, "inference_optimized", "--attention dense"),
    ({"qk_clip": True}, "--qk-clip", "--attention dense"),
    ({"log_max_attention_logit": True}, "--log-max-attention-logit", "leave it out"),
    ({"flash_decode": True}, "--flash-decode", "--attention dense"),
    ({"fp8_multi_head_attention": True}, "fp8_multi_head_attention", "use --fp8-dot-product-attention"),
    ({"tensor_model_parallel_size": 4}, "--tensor-model-parallel-size 4", "use --tensor-model-parallel-size 2."),
]


@pytest.mark.parametrize(("changes", "named", "advice"), REFUSED, ids=[named for _, named, _ in REFUSED])
def test_options_that_are_refused(changes: dict[str, Any], named: str, advice: str) -> None:
    message = problems(**changes)
    assert named in message
    assert advice in message


ACCEPTED = [
    {},
    {"hidden_dropout": 0.1},
    {"num_query_groups": None},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    {"pipeline_model_parallel_size": 2},
    {"recompute_granularity": "full"},
    {"num_moe_experts": 4},
    {"bf16": True},
    {**WINDOWS, "context_parallel_size": 2, "cp_comm_type": "all_gather"},
    {**WINDOWS, "context_parallel_size": 2, "cp_comm_type": ["a2a", "p2p"] * 3},
    {**WINDOWS, **LOCAL_RANKS},
    {**SINKS, "context_parallel_size": 2, "cp_comm_type": "a2a"},
    {"softmax_type": "off-by-one"},
]


@pytest.mark.parametrize("changes", ACCEPTED, ids=str)
def test_options_that_are_accepted(changes: dict[str, Any]) -> None:
    assert problems(**changes) == ""


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (-1, 1, "--lighthouse-dense-first -1 must not be negative"),
        (1, -1, "--lighthouse-dense-last -1 must not be negative"),
        (3, 3, "leave none of 6 layers"),
        (6, 0, "leave none of 6 layers"),
        (3, 2, ""),
        (0, 0, ""),
    ],
)
def test_numbers_of_dense_layers(first: int, last: int, message: str) -> None:
    found = problems(LighthouseSettings(GOOD.config, first, last))
    assert (message in found) if message else not found


def test_sequence_length() -> None:
    assert "--seq-length 250 must be a multiple of 32" in problems(seq_length=250)
    assert "refines more windows" in problems(seq_length=96)
    assert problems(seq_length=None) == ""


def test_every_problem_is_named_at_once() -> None:
    message = problems(seq_length=250, attention_dropout=0.1, qk_layernorm=True)
    assert all(part in message for part in ("--seq-length 250", "--attention-dropout 0.1", "--qk-layernorm"))


@pytest.mark.parametrize(
    "name",
    [
        *("reset_attention_mask", "hybrid_context_parallel", "dynamic_context_parallel", "perform_rl_step"),
    ],
)
def test_run_options_that_are_refused(name: str) -> None:
    from megatron_lighthouse.mcore.command_line.checks import check_run

    check_run(Namespace(seq_length=256, **{name: False}), transformer_config(), GOOD)
    with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
        check_run(Namespace(seq_length=256, **{name: True}), transformer_config(), GOOD)


def test_the_options_exist_in_megatron() -> None:
    """Else a renamed option would never be refused."""
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    from megatron_lighthouse.mcore.command_line.run_options import NOT_HERE
    from megatron_lighthouse.mcore.data.blends import DATA, LISTS

    known = {action.dest for action in add_megatron_arguments(ArgumentParser())._actions}
    assert {
        *NOT_HERE,
        *(name[2:].replace("-", "_") for name in (*DATA, *LISTS)),
        "reset_attention_mask",
        "attention_backend",
        "mtp_num_layers",
        "tokenizer_type",
    } <= known
    assert {"softmax_type", "experimental_attention_variant"} <= known


def test_transformer_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lighthouse.mcore.command_line import run_options

    engine = plain_run(transformer_impl="transformer_engine")
    monkeypatch.setattr(run_options, "find_spec", lambda name: object())
    run_options.check_run_options(engine)
    monkeypatch.setattr(run_options, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package transformer_engine.*or use --transformer-impl local"):
        run_options.check_run_options(engine)


def plain_run(**changes: Any) -> Namespace:
    options = {
        "transformer_impl": "local",
        "text_data": None,
        "tokenizer_type": "NullTokenizer",
        "pipeline_model_parallel_size": 2,
        "context_parallel_size": 1,
        "mtp_num_layers": None,
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "position_embedding_type": "none",
        "use_rotary_position_embeddings": False,
        "gradient_accumulation_fusion": False,
        "no_persist_layer_norm": True,
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": False,
        "softmax_type": "vanilla",
        "experimental_attention_variant": None,
    }
    return Namespace(**{**options, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft": True}, r"--sft with --tokenizer-type .*: use SFTTokenizer"),
        ({"fim_data": True}, "--fim-data is not done"),
        ({"reset_attention_mask": True}, "--reset-attention-mask .* use --dataloader-inter-document-masking"),
        ({"hybrid_context_parallel": True}, "--hybrid-context-parallel"),
        ({"perform_rl_step": True}, "--perform-rl-step"),
        ({"check_for_spiky_loss": True}, "--check-for-spiky-loss"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1 with --pipeline-model-parallel-size 2 .* use pipeline size 1"),
        (
            {"mtp_num_layers": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 2},
            "--mtp-num-layers 1 with --context-parallel-size 2: .* use context-parallel size 1",
        ),
        (
            {"multi_latent_attention": True, "tensor_model_parallel_size": 2},
            "--multi-latent-attention with --tensor-model-parallel-size 2 .* add --sequence-parallel",
        ),
        (
            {"experimental_attention_variant": "gated_delta_net", "tensor_model_parallel_size": 2},
            "--experimental-attention-variant gated_delta_net with --tensor-model-parallel-size 2: .* add --sequence-parallel",
        ),
        ({"text_data": ["a"], "data_path": ["b"]}, "--data-path and --text-data are each the data of a run"),
        ({"text_data": ["a"], "mock_data": True}, "--text-data and --mock-data are each the data"),
        ({"text_data": ["a"], "tokenizer_type": "GPT2BPETokenizer"}, "--tokenizer-type GPT2BPETokenizer does not go with"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_the_entry_point_leaves_to_upstream(changes: dict[str, Any], message: str) -> None:
    from megatron_lighthouse.mcore.command_line.run_options import check_run_options

    check_run_options(plain_run())
    check_run_options(plain_run(text_data=["a"]))
    check_run_options(plain_run(mtp_num_layers=1, pipeline_model_parallel_size=1))
    check_run_options(plain_run(softmax_type="learnable"))
    delta = {"experimental_attention_variant": "gated_delta_net", "sequence_parallel": True}
    check_run_options(plain_run(tensor_model_parallel_size=2, **delta))
    with pytest.raises(ValueError, match=message):
        check_run_options(plain_run(**changes))


def test_attention_backend_local() -> None:
    from megatron.core.transformer.enums import AttnBackend

    from megatron_lighthouse.mcore.command_line.checks import check_run

    check_run(Namespace(seq_length=256, attention_backend=AttnBackend.auto), transformer_config(), GOOD)
    with pytest.raises(ValueError, match="--transformer-impl local"):
        check_run(Namespace(seq_length=256, attention_backend=AttnBackend.local), transformer_config(), GOOD)


def test_a_spec_that_makes_lighthouse_needs_no_mask() -> None:
    """One of N x N bytes would not fit; `--attention lighthouse` makes none either."""
    from megatron_lighthouse.mcore.attention.layer_specs import lighthouse
    from megatron_lighthouse.mcore.command_line.arguments import use_attention

    words = "--lighthouse-budget 8 --lighthouse-tile-budget 4 --lighthouse-dense-first 1 --lighthouse-dense-last 1"
    given = arguments(*words.split(), seq_length=256, create_attention_mask_in_dataloader=True)
    model = Namespace(transformer=transformer_config(), transformer_layer_spec=lighthouse)
    assert use_attention(given, model) is model
    assert not given.create_attention_mask_in_dataloader


@pytest.mark.parametrize("reset", [False, True])
def test_dense_layers_are_given_a_mask_only_where_it_says_something(reset: bool) -> None:
    from megatron_lighthouse.mcore.command_line.arguments import use_attention

    dense = {"seq_length": 256, "create_attention_mask_in_dataloader": True, "reset_attention_mask": reset}
    given = arguments("--attention", "dense", **dense)
    use_attention(given, Namespace(transformer=transformer_config(), transformer_layer_spec=None))
    assert given.create_attention_mask_in_dataloader is reset


def test_the_entry_point_refuses_before_anything_starts(tmp_path: Path) -> None:
    log = refused(tmp_path, "--attention", "lighthouse", "--attention-dropout", "0.1", "--lighthouse-dense-last", "3")
    assert "--attention-dropout 0.1 would drop whole windows: use --attention-dropout 0" in log
    assert "leave none of 4 layers" in log
    assert "initialized tensor model parallel" not in log


def test_spec_refuses_run_options_too(tmp_path: Path) -> None:
    log = refused(tmp_path, "--spec", "megatron_lighthouse.mcore.spec", "lighthouse", "--reset-attention-mask")
    assert "--reset-attention-mask separates documents by a mask" in log
    assert "use --dataloader-inter-document-masking" in log
    assert "initialized tensor model parallel" not in log
