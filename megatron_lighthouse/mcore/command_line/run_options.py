"""What this entry point leaves to Megatron-LM's own pretrain_gpt.py, whatever the attention. Refused, never ignored."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from importlib.util import find_spec

from megatron_lighthouse.mcore.command_line import (
    conversations,
    graphs,
    hybrid,
    inner,
    latent,
    optimizer_graph,
    positions,
    tiles,
)
from megatron_lighthouse.mcore.command_line.checks import PACKED, cp_layout_problems, packed_problems
from megatron_lighthouse.mcore.command_line.own_parts import norm_problem
from megatron_lighthouse.mcore.command_line.unread import unread_problems
from megatron_lighthouse.mcore.data import tokenizers
from megatron_lighthouse.mcore.data.blends import exclusion
from megatron_lighthouse.softmax.names import MODULES
from megatron_lighthouse.variants import VARIANTS

ELSEWHERE = "use Megatron-LM's own pretrain_gpt.py for it (patches/patch.py gives that --attention lighthouse)"

OF_ENGINE = ("layernorm", "moe_act", "mla_up_proj", "gdn_norm_out")
"""Of --recompute-modules, those whose outputs Megatron drops by a function that reads Transformer Engine's state."""
NOT_HERE = {
    **{name: PACKED[name] for name in ("hybrid_context_parallel", "perform_rl_step")},
    "fim_data": "--fim-data",
    "check_for_spiky_loss": "--check-for-spiky-loss",
    "overlap_moe_expert_parallel_comm": "--overlap-moe-expert-parallel-comm",
    "logits_load_dir": "--logits-load-dir (distillation from stored logits)",
    "inprocess_restart": "--inprocess-restart",
    "yaml_cfg": "--yaml-cfg",
}


def check_run_options(args: Namespace) -> None:
    """Refuse options that this entry point would not honour, or that this machine lacks the package for.

    Raises:
        ValueError: the options, and where they work.
    """
    if found := [*problems(args), *missing_packages(args)]:
        raise ValueError("\n".join(found))


def without_gpus(args: Namespace) -> Iterator[str]:
    """Why ranks could not meet that have no GPUs, or not do what is asked of them."""
    if (kind := graphs.kind_of(args)) != "none":
        yield f"--cuda-graph-impl {kind} needs a GPU, and there is none here: leave it out."
    if args.distributed_backend == "nccl" and not getattr(args, "fake_process_group", False):
        yield (
            "--distributed-backend nccl (Megatron's default) is for GPUs, and the ranks have none: add "
            "--distributed-backend gloo, or start them where GPUs are."
        )


def missing_packages(args: Namespace, gpus: bool = False) -> Iterator[str]:
    """What the run needs and this Python lacks.

    Args:
        gpus: whether its ranks have GPUs, which some kernels of packages are for.
    """
    if args.transformer_impl == "transformer_engine" and not find_spec("transformer_engine"):
        more = "".join(f" {flag}" for flag in _of_local_layers(args))
        yield (
            "--transformer-impl transformer_engine (Megatron's default) needs the package transformer_engine, which is not "
            "installed: install it (pip install 'transformer-engine[core_cu13,pytorch]'), or use "
            f"--transformer-impl local{more}."
        )
    yield from _missing_fusions(args)
    yield from hybrid.missing_packages(args)
    for option, module, package in [*_asked_for(args), *(of_kernels(args) if gpus else ())]:
        if not find_spec(module.partition(".")[0]):
            yield f"{option} needs the package {module}, which is not installed: install it (pip install {package})."


def _asked_for(args: Namespace) -> Iterator[tuple[str, str, str]]:
    """Options that Megatron asks a package for, late: with the module, and what pip knows it by."""
    for package in tokenizers.packages(args.tokenizer_type):
        yield f"--tokenizer-type {args.tokenizer_type}", package, package
    if files := tokenizers.downloaded(args):
        names = " and ".join(files)
        yield f"--tokenizer-type {args.tokenizer_type} without {names}, which it downloads (or give these),", "wget", "wget"
    if project := getattr(args, "wandb_project", None):
        yield f"--wandb-project {project}", "wandb", "wandb"
    if getattr(args, "skip_train", False):
        return
    if graphs.kind_of(args) == "transformer_engine" and args.transformer_impl == "local":
        yield "--cuda-graph-impl transformer_engine", "transformer_engine", "'transformer-engine[core_cu13,pytorch]'"
    if (optimizer := getattr(args, "optimizer", "adam")) not in ("adam", "sgd"):
        yield f"--optimizer {optimizer}", "emerging_optimizers", "emerging-optimizers"
    if optimizer_graph.missing(args):
        yield optimizer_graph.FLAG, "transformer_engine", "'transformer-engine[core_cu13,pytorch]'"
    if getattr(args, "non_persistent_ckpt_type", None) == "local":
        yield "--non-persistent-ckpt-type local", "nvidia_resiliency_ext", "nvidia-resiliency-ext"
    if getattr(args, "async_save", False) and getattr(args, "use_persistent_ckpt_worker", False):
        yield "--use-persistent-ckpt-worker", "nvidia_resiliency_ext", "nvidia-resiliency-ext"
    if (instances := getattr(args, "num_distributed_optimizer_instances", 1)) > 1:
        yield f"--num-distributed-optimizer-instances {instances}", "einops", "einops"


def of_kernels(args: Namespace) -> Iterator[tuple[str, str, str]]:
    """Options that ask a package for a GPU's kernels, once a layer is built: with the module, and what pip knows it by."""
    if not VARIANTS[args.attention].selects:
        return
    if args.lighthouse_scorer == "gla":
        yield "--lighthouse-scorer gla", "fla.ops.simple_gla", "'flash-linear-attention>=0.6.0'"
    name = args.lighthouse_inner
    if name in MODULES and inner.is_forced(args):
        yield f"--lighthouse-inner {name} (or use auto)", *MODULES[name]


def _of_local_layers(args: Namespace) -> Iterator[str]:
    """What Megatron's local layers then need besides."""
    rotary = args.position_embedding_type == "rope" or args.use_rotary_position_embeddings
    if rotary and getattr(args, "apply_rope_fusion", False):
        yield "--no-rope-fusion"
    if not (find_spec("apex") or args.no_persist_layer_norm or args.sequence_parallel):
        yield "--no-persist-layer-norm"
    if _fuses_softmax(args):
        yield "--no-masked-softmax-fusion"


def _fuses_softmax(args: Namespace) -> bool:
    """Whether a layer of Megatron's own attention asks Apex for a softmax that is not installed.

    Megatron does for up to 4,096 tokens in 16 bits, where a rank's rows and heads are a multiple of four.
    """
    if not getattr(args, "masked_softmax_fusion", False) or find_spec("scaled_masked_softmax_cuda"):
        return False
    variant, heads = VARIANTS[args.attention], args.num_attention_heads or 0
    if not (variant.native or (variant.selects and (args.lighthouse_dense_first or args.lighthouse_dense_last))):
        return False
    if (args.micro_batch_size or 1) * (heads // args.tensor_model_parallel_size) % 4:
        return False
    length = getattr(args, "seq_length", None) or 0
    of_16_bits = getattr(args, "bf16", False) or getattr(args, "fp16", False)
    return bool(of_16_bits and 16 < length <= 4096 and length % 4 == 0 and args.context_parallel_size == 1)


def _missing_fusions(args: Namespace) -> Iterator[str]:
    """Megatron's defaults that need Apex or Transformer Engine, which it says once the model is built."""
    engine, apex = find_spec("transformer_engine"), find_spec("apex")
    rotary = args.position_embedding_type == "rope" or args.use_rotary_position_embeddings
    if args.gradient_accumulation_fusion and not find_spec("fused_weight_gradient_mlp_cuda"):
        yield (
            "gradient accumulation fusion (Megatron's default) needs fused_weight_gradient_mlp_cuda of NVIDIA Apex, which is "
            "not installed: add --no-gradient-accumulation-fusion."
        )
    if args.transformer_impl == "local" and _fuses_softmax(args):
        yield (
            "masked softmax fusion (Megatron's default) needs scaled_masked_softmax_cuda of NVIDIA Apex, which is not "
            "installed: add --no-masked-softmax-fusion."
        )
    if args.transformer_impl != "local" or engine:
        return
    selected = getattr(args, "recompute_granularity", None) == "selective" and (args.recompute_modules or ())
    if held := [name for name in selected or () if name in OF_ENGINE]:
        yield (
            f"--recompute-modules {' '.join(held)} needs Transformer Engine, which is not installed: use core_attn, mlp or moe."
        )
    if rotary and args.apply_rope_fusion:
        yield "RoPE fusion (Megatron's default) needs Transformer Engine, which is not installed: add --no-rope-fusion."
    if not apex and args.sequence_parallel and args.tensor_model_parallel_size > 1 and (problem := norm_problem(args)):
        yield problem
    if not (apex or args.no_persist_layer_norm or args.sequence_parallel):
        yield "persistent layer norm (Megatron's default) needs Apex, which is not installed: add --no-persist-layer-norm."


def problems(args: Namespace, model_is_known: bool = True) -> Iterator[str]:
    """Options that this entry point would not honour, whatever machine it runs on.

    Args:
        model_is_known: else a checkpoint that is not read yet says what its positions are.
    """
    yield from packed_problems(args)
    for name, option in NOT_HERE.items():
        if getattr(args, name, False) and name not in PACKED:
            yield f"{option} is not done by megatron_lighthouse.pretrain_gpt: {ELSEWHERE}."
    yield from unread_problems(args)
    yield from tiles.problems(args)
    yield from graphs.problems(args)
    yield from optimizer_graph.problems(args)
    yield from hybrid.problems(args)
    yield from conversations.problems(args)
    if model_is_known:
        yield from positions.problems(args)
        yield from latent.problems(args)
    yield from _full_validation(args)
    yield from cp_layout_problems(args)
    yield from _wrong_in_megatron(args)
    if args.text_data:
        if problem := exclusion(args):
            yield problem
        elif args.tokenizer_type != "NullTokenizer":
            yield (
                f"--tokenizer-type {args.tokenizer_type} does not go with --text-data, whose tokens are bytes: leave it out."
            )


def _wrong_in_megatron(args: Namespace) -> Iterator[str]:
    """Layouts of which Megatron's result is not that of one process."""
    if getattr(args, "mtp_num_layers", None) and args.pipeline_model_parallel_size > 1:
        yield (
            f"--mtp-num-layers {args.mtp_num_layers} with --pipeline-model-parallel-size {args.pipeline_model_parallel_size} "
            f"is not done by megatron_lighthouse.pretrain_gpt: use pipeline size 1, or {ELSEWHERE}."
        )
    if getattr(args, "mtp_num_layers", None) and args.context_parallel_size > 1:
        yield (
            f"--mtp-num-layers {args.mtp_num_layers} with --context-parallel-size {args.context_parallel_size}: Megatron "
            "averages the loss of these layers over ranks that count different numbers of tokens (Megatron-LM 3943, 7452), "
            "which is not the loss of one process: use context-parallel size 1."
        )
    size, latent = args.tensor_model_parallel_size, getattr(args, "multi_latent_attention", False)
    if latent and size > 1 and args.transformer_impl == "local" and not args.sequence_parallel:
        yield (
            f"--multi-latent-attention with --tensor-model-parallel-size {size} and --transformer-impl local: Megatron adds up "
            "gradients of its norms over ranks that each have all of them: add --sequence-parallel."
        )
    if getattr(args, "init_method_xavier_uniform", False):
        yield "--init-method-xavier-uniform fails in Megatron 0.19, whose config has no such field: leave it out."
    variant = getattr(args, "experimental_attention_variant", None)
    if variant == "gated_delta_net" and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        yield (
            f"--experimental-attention-variant {variant} with --tensor-model-parallel-size {args.tensor_model_parallel_size}: "
            "Megatron does not add up the gradients of its norm over the ranks (Megatron-LM 7452): add --sequence-parallel."
        )
    if getattr(args, "heterogeneous_layers_config_encoded_json", None) and not args.heterogeneous_layers_config_path:
        yield (
            "--heterogeneous-layers-config-encoded-json alone is not heeded by Megatron, which would make all layers alike: "
            "write it to a file, and give --heterogeneous-layers-config-path FILE."
        )


def _full_validation(args: Namespace) -> Iterator[str]:
    """What Megatron's loop fails of, once it validates."""
    full, several = getattr(args, "full_validation", False), getattr(args, "multiple_validation_sets", False)
    if full and not several:
        yield "--full-validation fails in Megatron at its first validation: add --multiple-validation-sets (of one set too)."
    if several and not full:
        yield "--multiple-validation-sets is not done by Megatron without --full-validation: add it, or leave both out."
    if not full:
        return
    if args.pipeline_model_parallel_size > 2:
        yield (
            f"--full-validation fails in Megatron with --pipeline-model-parallel-size {args.pipeline_model_parallel_size}, "
            "whose middle stages have no data: use at most 2, or leave it out."
        )
    rows = args.eval_micro_batch_size or args.micro_batch_size
    if rows != 1 and args.tensor_model_parallel_size * args.pipeline_model_parallel_size > 1:
        yield (
            f"--full-validation reads one sequence at a time, and --eval-micro-batch-size {rows} (where "
            "not given, --micro-batch-size) is what other ranks wait for: use --eval-micro-batch-size 1."
        )
    split = args.split and (args.data_path or args.data_args_path or args.mock_data) and args.split.split(",")[2:]
    if args.test_data_path or (split and float(split[0])):
        given = "--test-data-path" if args.test_data_path else f"--split {args.split}"
        yield (
            f"--full-validation fails in Megatron where there is a test set ({given}): use --split A,B,0, or "
            "--train-data-path and --valid-data-path alone."
        )
