"""No option is ignored: what upstream's pretrain_gpt.py reads we read or refuse, and what nobody reads is refused.

A new release of Megatron fails here until it is compared again: read what its pretrain_gpt.py reads (python -m
tests.mcore.upstream_reads), bring UPSTREAM up to date, and what has changed of it into the product.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from megatron_lighthouse.mcore.command_line import unread
from megatron_lighthouse.mcore.command_line.run_options import NOT_HERE, check_run_options
from tests.mcore.harness import ROOT
from tests.mcore.test_checks import plain_run
from tests.mcore.upstream_reads import mentions, reads

pytestmark = pytest.mark.usefixtures("megatron")

COMPARED = "0.19.2"
UPSTREAM = """
    allow_ambiguous_pad_tokens check_for_nan_in_loss_and_grad check_for_spiky_loss context_parallel_size
    create_attention_mask_in_dataloader data_cache_path data_parallel_size dataloader_defer_npy_index_mmap
    dataloader_fast_cache_load dataloader_inter_document_masking eod_mask_loss fim_data fim_eod_token fim_fragment_rate
    fim_middle_token fim_no_prefix fim_pad_token fim_prefix_token fim_rate fim_split_sample fim_spm_rate fim_suffix_token
    full_validation hybrid_context_parallel logits_load_decode_threads logits_load_dir logits_load_ignore_errors
    logits_load_kd_loss_alpha logits_load_msc_prefetch_depth logits_load_prefetch_factor micro_batch_size
    mid_level_dataset_surplus mmap_bin_files mock_data modelopt_enabled multiple_validation_sets num_dataset_builder_threads
    object_storage_cache_path overlap_moe_expert_parallel_comm per_dataset_sequences_path pipeline_model_parallel_size
    reset_attention_mask reset_position_ids seed seq_length sequence_parallel sft split tensor_model_parallel_size
    untie_embeddings_and_output_weights
""".split()
"""Read by upstream's pretrain_gpt.py at core_r0.19.0, which also asks for in-process restarts and times ranks."""
LEFT_TO_MEGATRON = {
    "untie_embeddings_and_output_weights": "the model's builder; upstream's script needs it for MTP over pipeline stages",
    "modelopt_enabled": "no option of a parser without NVIDIA's Model Optimizer, which the wheel lacks",
}
ONLY_UPSTREAM_CALLS = ("inprocess_restart.py", "datasets/fim_dataset.py", "datasets/sft_dataset.py", "distillation")
"""Parts of megatron.training that its training loop does not call."""
BY_PREFIX = ("muon_",)
"""Fields that Megatron reads by names it puts together (core/optimizer/emerging_optimizers.py)."""


def sources(folder: Path) -> list[str]:
    left_out = tuple(str(folder / part) for part in ONLY_UPSTREAM_CALLS)
    return [path.read_text() for path in folder.rglob("*.py") if not str(path).startswith(left_out)]


def ours() -> set[str]:
    return set().union(*map(reads, sources(ROOT / "megatron_lighthouse" / "mcore")))


def options() -> dict[str, Any]:
    from megatron.training.arguments import add_megatron_arguments

    return {action.dest: action for action in add_megatron_arguments(ArgumentParser())._actions if action.dest != "help"}


def configurations() -> set[str]:
    """Fields of what Megatron makes from arguments of the same names."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import MLATransformerConfig
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
    from megatron.training import config

    kinds = [kind for kind in vars(config).values() if isinstance(kind, type) and is_dataclass(kind)]
    kinds += [DistributedDataParallelConfig, OptimizerConfig, MLATransformerConfig, HeterogeneousTransformerConfig]
    return {field.name for kind in kinds for field in fields(kind)}


def test_upstream_was_compared_with_this_release() -> None:
    assert version("megatron-core") == COMPARED


def test_what_upstream_reads_is_carried_out_or_refused() -> None:
    refused = {*NOT_HERE, *(name for name in UPSTREAM if name.startswith(tuple(unread.OF_REFUSED.values())))}
    assert {*UPSTREAM} - ours() - refused == {*LEFT_TO_MEGATRON}


def test_an_option_is_read_or_refused() -> None:
    import megatron.core
    import megatron.training

    read, mentioned = ours(), set()
    for module in (megatron.training, megatron.core):
        for text in sources(Path(module.__file__).parent):
            read |= reads(text)
            mentioned |= mentions(text)
    by_field = configurations() & mentioned
    found = {name for name in options() if name not in read | by_field and not name.startswith(BY_PREFIX)}
    governed = {name for name in options() if name.startswith(tuple(unread.OF_REFUSED.values()))}
    assert found - governed - {*NOT_HERE} == {*unread.INSTEAD, *unread.OF_OTHER_PROGRAMS}


def test_what_we_read_is_there() -> None:
    """Else a renamed option would be heeded and refused no more."""
    from megatron.core.transformer import TransformerConfig
    from megatron.training.arguments import add_megatron_arguments

    from megatron_lighthouse.launch import layout
    from megatron_lighthouse.mcore.command_line.arguments import with_lighthouse_arguments
    from megatron_lighthouse.mcore.data import blends
    from megatron_lighthouse.mcore.loop import pretrain
    from megatron_lighthouse.plan import words

    parser = with_lighthouse_arguments(pretrain.add_arguments)(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    by_the_loop = {
        "consumed_train_samples",
        "consumed_valid_samples",
        "curr_iteration",
        "data_parallel_size",
        "iteration",
        "rank",
        "world_size",
    }
    by_us = {"lighthouse_environment", "malformed", "said", "sizes_settled", "validates_conversations"}
    assert ours() - {action.dest for action in parser._actions} == by_the_loop | by_us
    package = ROOT / "megatron_lighthouse"
    of_model = reads((package / "mcore/command_line/checks.py").read_text(), "config")
    of_model |= set().union(*(reads(path.read_text(), "model") for path in package.glob("**/variant.py")))
    assert len(of_model) > 12
    assert of_model <= {field.name for field in fields(TransformerConfig)}
    named = {*words.SIZES, *words.NEEDED, *words.NOT_COUNTED, *blends.DATA, *blends.LISTS, *layout.ENDS}
    named |= {"--" + name.replace("_", "-") for name in vars(words._parse([]))}
    known = {*parser._option_string_actions}
    positive = {"--" + flag.removeprefix("--no-") for flag in known if flag.startswith("--no-")}
    assert named <= known | positive | {"--no-" + flag[2:] for flag in known}


YARN, MLA = {"position_embedding_type": "yarn"}, {"multi_latent_attention": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rampup_batch_size": ["2", "2", "8"]}, "--rampup-batch-size is read by nothing .* use --step-batch-size-schedule"),
        ({"use_flash_attn": True}, "--use-flash-attn is read by nothing .* use --attention-backend flash"),
        ({"openai_gelu": True}, "--openai-gelu is read by nothing in this Megatron: leave it out"),
        ({"rl_default_top_k": 3}, "--rl-default-top-k is read by nothing that trains GPT: leave it out"),
        ({"logits_load_kd_loss_alpha": 0.5}, "--logits-load-kd-loss-alpha means nothing without --logits-load-dir"),
        ({"inprocess_granularity": "rank"}, "--inprocess-granularity means nothing without --inprocess-restart"),
        ({"fim_rate": 0.7}, "--fim-rate means nothing without --fim-data"),
        ({"logits_load_dir": "there"}, "--logits-load-dir .* is not done .* use Megatron-LM's own pretrain_gpt.py"),
        ({"inprocess_restart": True}, "--inprocess-restart is not done"),
        ({"yaml_cfg": "file"}, "--yaml-cfg is not done"),
        ({"hybrid_layer_pattern": "M*"}, r"--hybrid-layer-pattern M\* with --transformer-impl local: of M"),
        ({"rope_scaling_factor": 32.0, "use_rope_scaling": False}, "--rope-scaling-factor 32.0 means nothing without"),
        ({**YARN, "rotary_percent": 0.5}, "--rotary-percent 0.5 is not read with --position-embedding-type yarn: leave it out"),
        ({**YARN, "rotary_interleaved": True}, "--rotary-interleaved is not read with --position-embedding-type yarn"),
        ({**YARN, "rotary_seq_len_interpolation_factor": 4.0}, "--rotary-seq-len-interpolation-factor 4.0 is not read with"),
        ({**MLA, "rotary_percent": 0.5}, "--rotary-percent 0.5 is not read with --multi-latent-.* use --rope-type rope"),
        ({**MLA, "rotary_interleaved": True}, "--rotary-interleaved is not read with --multi-latent-attention: leave it out"),
        ({**MLA, "rotary_seq_len_interpolation_factor": 4.0}, "-interpolation-factor 4.0 is not read with --multi-latent"),
        ({**MLA, "rope_type": "rope", "rotary_scaling_factor": 40.0}, "--rotary-scaling-factor 40.0 .* use --rope-type yarn"),
        ({"rope_type": "yarn"}, "--rope-type yarn is MLA's: use --position-embedding-type yarn"),
        ({"mrope_section": [1, 2, 3]}, "--mrope-section 1 2 3 means nothing without --position-embedding-type mrope"),
        ({"position_embedding_type": "mrope"}, "--position-embedding-type mrope needs --mrope-section"),
        ({"full_validation": True}, "--full-validation fails .* add --multiple-validation-sets"),
        ({"multiple_validation_sets": True}, "--multiple-validation-sets .* without --full-validation: add it"),
        (
            {"full_validation": True, "multiple_validation_sets": True, "pipeline_model_parallel_size": 4},
            "--pipeline-model-parallel-size 4, whose middle stages have no data: use at most 2",
        ),
        (
            {"full_validation": True, "multiple_validation_sets": True, "data_path": ["a"], "split": "969, 30, 1"},
            r"where there is a test set \(--split 969, 30, 1\): use --split A,B,0",
        ),
        (
            {"full_validation": True, "multiple_validation_sets": True, "test_data_path": ["a"]},
            r"where there is a test set \(--test-data-path\): .* --valid-data-path alone",
        ),
        (
            {"full_validation": True, "multiple_validation_sets": True, "eval_micro_batch_size": 2},
            "--eval-micro-batch-size 2 .* use --eval-micro-batch-size 1",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_an_option_that_would_be_ignored_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    others = {"eval_micro_batch_size": 1, "tensor_model_parallel_size": 1, "deprecated_use_mcore_models": True}
    others |= {"data_path": None, "data_args_path": None, "mock_data": False, "test_data_path": None, "split": None}
    whole = {"full_validation": True, "multiple_validation_sets": True}
    check_run_options(plain_run(**others, **whole))
    check_run_options(plain_run(**{**others, "data_path": ["a"], "split": "90,10,0"}, **whole))
    check_run_options(plain_run(**others, **YARN, rotary_scaling_factor=4.0))
    check_run_options(plain_run(**others, **MLA, rope_type="rope", rotary_percent=0.5))
    check_run_options(plain_run(**others, **MLA, rotary_scaling_factor=40.0, mscale_all_dim=1.0))
    with pytest.raises(ValueError, match=message):
        check_run_options(plain_run(**{**others, **changes}))


def test_the_factor_of_llama_3s_rope_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron leaves it at 8."""
    from megatron.training import argument_utils

    from megatron_lighthouse.mcore.command_line.arguments import model_config
    from tests.mcore.test_spec import transformer_config

    def config(args: Namespace) -> Any:
        return argument_utils.GPTModelConfig(transformer=transformer_config(), rope_scaling=args.use_rope_scaling)

    monkeypatch.setattr(argument_utils, "gpt_config_from_args", config)
    for scaled, factor in ((True, 32.0), (False, 8.0)):
        assert model_config(Namespace(use_rope_scaling=scaled, rope_scaling_factor=32.0)).rope_scaling_factor == factor


def test_ranks_are_timed_where_they_read_and_where_they_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lighthouse.mcore.loop import forward_step as module

    told: list[str] = []
    timer = Namespace(start=lambda: None, stop=lambda: None)
    monkeypatch.setattr(module, "get_timers", lambda: lambda *_, **__: timer)
    monkeypatch.setattr(module, "get_args", lambda: Namespace(micro_batch_size=1, calculate_per_token_loss=False))
    monkeypatch.setattr(module, "get_attr_wrapped_model", lambda *_: None)
    monkeypatch.setattr(module, "_batch", lambda *_: told.append("reads") or ({}, None))
    monkeypatch.setattr(module.stragglers, "start", lambda: told.append(f"start, data {module.stragglers.bdata}"))
    monkeypatch.setattr(module.stragglers, "stop", lambda: told.append("stop"))

    def model(*_: Any, **__: Any) -> None:
        told.append("computes")
        module.stragglers.bdata = False

    model.training = True  # type: ignore[attr-defined]
    module.forward_step(iter([]), model)  # type: ignore[arg-type]
    assert [line.split(",")[0] for line in told] == ["start", "reads", "stop", "start", "computes", "stop"]
    assert told[0] == "start, data True"
