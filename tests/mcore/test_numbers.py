"""Numbers that Megatron's parser takes and no run can mean: refused before a job is queued, and by the run."""

from __future__ import annotations

import re
from argparse import Namespace

import pytest

from megatron_lighthouse.launch import check, start
from megatron_lighthouse.mcore.command_line import flags, numbers, unread
from megatron_lighthouse.mcore.command_line.entry import with_all_arguments
from megatron_lighthouse.usage import as_sentence
from tests.mcore.test_launch_check import GPUS, LLAMA

ANY = """
    glu_linear_offset activation_func_clamp_value mup_embedding_mult mup_output_mult mup_attn_scale_power fp8_margin
    moe_router_force_biased moe_expert_capacity_factor moe_expert_rank_capacity_factor mrope_section
    delta_offload_bytes_across_pp_ranks fine_grained_offloading_max_inflight_offloads muon_extra_scale_factor
    lr min_lr lr_warmup_init lr_warmup_fraction save_interval save_retain_interval
    async_ckpt_cpu_priority async_ckpt_io_priority replication_jump replication_factor override_ckpt_iteration local_rank
    suggested_communication_unit_size null_tokenizer_eod_id null_tokenizer_pad_id logging_level straggler_ctrlr_port
    straggler_minmax_count error_injection_rate ft_num_warmup_iters batch_size warmup model_parallel_size
""".split()
"""Numbers that may be anything, that rules of their own are for, or that Megatron takes for nothing."""
OF_OTHERS = ("dsa_", "moe_deepep_", "moe_hybridep_", "moe_flex_", "moe_paged_", "grpo_", "rl_", "inference_", "fault_injector_")
OF_OTHERS += ("fim_", "logits_", "inprocess_", "num_speculative_", "mlp_chunks_for_prefill")
"""How those begin that are of kernels, services and programs which this project leaves to Megatron."""
KINDS = ("int", "float", "moe_freq_type", "no_rope_freq_type", "la_freq_type")


def parsed(*words: str) -> Namespace:
    return flags.parse([*LLAMA, *words], with_all_arguments, strict=False)[0]


def test_each_number_of_megatrons_has_a_rule_or_is_known_to_need_none() -> None:
    of_training = {
        flag["dest"]
        for flag in flags.listed()
        if flag.get("type") in KINDS and "choices" not in flag and not flag["dest"].startswith(OF_OTHERS)
    }
    of_training -= {*unread.OF_OTHER_PROGRAMS, *unread.INSTEAD}
    assert of_training - {*numbers.RULES} == {*ANY}
    assert {*numbers.RULES} <= of_training
    defaults = {flag["dest"]: flag.get("default") for flag in flags.listed()}
    assert [*numbers.problems(Namespace(**defaults))] == []


def test_what_breaks_a_rule_is_refused_with_a_number_that_keeps_it() -> None:
    args, flag_of = parsed(), {flag["dest"]: flag["flags"][0] for flag in flags.listed()}
    assert [*numbers.problems(args)] == []
    for name in numbers.RULES:
        given = vars(args).copy()
        given[name] = [-3] if isinstance(given[name], list) else -3
        (said,) = numbers.problems(Namespace(**given))
        assert said.startswith(f"{flag_of[name]} -3 must be "), said
        use = re.search(r"use ([\d.e-]+)(,| or more)", said)
        assert use, said
        assert [*numbers.problems(Namespace(**given | {name: float(use[1])}))] == [], said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--kv-channels 0", "--kv-channels 0 must be at least 1"),
        ("--tensor-model-parallel-size 0", "--tensor-model-parallel-size 0 must be at least 1"),
        ("--rope-scaling-factor 0", "--rope-scaling-factor 0.0 must be above 0: use 8"),
        ("--rotary-percent 2", "--rotary-percent 2.0 must be above 0, and at most 1"),
        ("--lr nan", "--lr nan must be finite"),
        ("--adam-beta2 1", "--adam-beta2 1.0 must be from 0 up to, not including, 1: use 0.999"),
        ("--window-size 128,0 --window-attn-skip-freq 0", "--window-attn-skip-freq 0 must be at least 1"),
        ("--profile-ranks 0 -2", "--profile-ranks -2 must be at least 0"),
        ("--kv-channels 7", "RoPE turns pairs: use --kv-channels 8"),
        ("--rotary-percent 0.01", "are 1 channels, and RoPE turns pairs"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 20001", "must be at most the 20000 iterations .* use 1000"),
        ("--rotary-scaling-factor 4", "is YaRN's, and the model does not read it: .* or use --position-embedding-type yarn"),
        (
            "--position-embedding-type yarn",
            "--use-rope-scaling and --rope-scaling-factor 8.0 are not read with --position-embedding-type yarn",
        ),
        ("--position-embedding-type learned_absolute", "--rotary-base 500000 means nothing with"),
        ("--rotary-base 5e5", "--rotary-base 5e5 must be a whole number, in digits alone: write 500000."),
    ],
)
def test_the_check_refuses_it(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([*GPUS, "--without-megatron", "--", *LLAMA, *words.split()]) == 1
    assert re.search(says, error := capsys.readouterr().err), error


def test_the_run_refuses_it_too() -> None:
    """Before Megatron reads the words."""
    with pytest.raises(ValueError, match="--rotary-base 0 must be at least 1") as error:
        start.check([*LLAMA, "--rotary-base", "0", "--kv-channels", "-8"], 64, gpus=True, whole=True)
    assert "--kv-channels -8 must be at least 1" in str(error.value)


def test_frequencies_are_lists_too() -> None:
    assert [*numbers.problems(parsed("--moe-layer-freq", "[0,1]"))] == []
    assert [*numbers.problems(Namespace(moe_layer_freq=[0, 1]))] == []


@pytest.mark.parametrize(
    ("kind", "word", "says"),
    [
        ("int", "5e5", "write 500000."),
        ("int", "500k", "write 500000."),
        ("int", "1M", "write 1000000."),
        ("int", "131,072", "write 131072."),
        ("int", "-1e3", "write -1000."),
        ("int", "1.5", "give one."),
        ("int", "", "give one."),
        ("int", "1e999", "give one."),
        ("float", "0,1", "write 0.1."),
        ("float", "3e-4x", "give one."),
    ],
)
def test_how_a_number_is_written(kind: str, word: str, says: str) -> None:
    said = as_sentence(f"argument --flag: invalid {kind} value: '{word}'")
    assert (said.startswith(f"--flag {word} must be a "), said.endswith(f": {says}")) == (True, True), said


@pytest.mark.parametrize(
    ("flag", "unit"),
    [
        ("--seq-length", 1024),
        ("--decoder-seq-length", 1024),
        ("--max-position-embeddings", 1024),
        ("--lighthouse-budget", 1024),
        ("--lighthouse-edge-budget", 1024),
        ("--loss-tile-tokens", 1024),
        ("--rotary-base", 1000),
        ("--train-iters", 1000),
        ("--train-samples", 1000),
        ("--vocab-size", 1000),
    ],
)
def test_only_lengths_are_counted_in_powers_of_two(flag: str, unit: int) -> None:
    """As of 128K tokens; of a base or iterations k is 1,000."""
    for word, number in (("2k", 2 * unit), ("1M", unit**2)):
        assert as_sentence(f"argument {flag}: invalid int value: '{word}'").endswith(f": write {number}.")
