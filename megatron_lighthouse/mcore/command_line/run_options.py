"""What this entry point leaves to Megatron-LM's own pretrain_gpt.py, whatever the attention. Refused, never ignored."""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec

ELSEWHERE = "use Megatron-LM's own pretrain_gpt.py for it (patches/patch.py gives that --attention lighthouse)"

NOT_HERE = {
    "sft": "--sft (packed sequences)",
    "fim_data": "--fim-data",
    "dataloader_inter_document_masking": "--dataloader-inter-document-masking (packed sequences)",
    "hybrid_context_parallel": "--hybrid-context-parallel (packed sequences)",
    "perform_rl_step": "--perform-rl-step",
    "check_for_spiky_loss": "--check-for-spiky-loss",
    "overlap_moe_expert_parallel_comm": "--overlap-moe-expert-parallel-comm",
}

OTHER_DATA = (
    *("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path"),
    *("per_split_data_args_path", "mock_data"),
)


def check_run_options(args: Namespace) -> None:
    """Refuse options that this entry point would not honour, or that this machine lacks the package for.

    Raises:
        ValueError: the options, and where they work.
    """
    if args.transformer_impl == "transformer_engine" and not find_spec("transformer_engine"):
        raise ValueError(
            "--transformer-impl transformer_engine (Megatron's default) needs the package transformer_engine, which is not "
            "installed: install it (pip install 'transformer-engine[core_cu13,pytorch]'), or use --transformer-impl local."
        )
    for name, option in NOT_HERE.items():
        if getattr(args, name, False):
            raise ValueError(f"{option} is not done by megatron_lighthouse.pretrain_gpt: {ELSEWHERE}.")
    if getattr(args, "mtp_num_layers", None) and args.pipeline_model_parallel_size > 1:
        raise ValueError(
            f"--mtp-num-layers {args.mtp_num_layers} with --pipeline-model-parallel-size {args.pipeline_model_parallel_size} "
            f"is not done by megatron_lighthouse.pretrain_gpt: use pipeline size 1, or {ELSEWHERE}."
        )
    if getattr(args, "mtp_num_layers", None) and args.context_parallel_size > 1:
        raise ValueError(
            f"--mtp-num-layers {args.mtp_num_layers} with --context-parallel-size {args.context_parallel_size}: Megatron "
            "averages the loss of these layers over ranks that count different numbers of tokens (Megatron-LM 3943, 7452), "
            "which is not the loss of one process: use context-parallel size 1."
        )
    if args.tensor_model_parallel_size > 1 and getattr(args, "softmax_type", "vanilla") == "learnable":
        raise ValueError(
            f"--softmax-type learnable with --tensor-model-parallel-size {args.tensor_model_parallel_size}: Megatron leaves "
            "the sinks of all ranks but the first out of the gradient's norm, and so clips otherwise than one process "
            "(Megatron-LM 7452): use --softmax-type vanilla or off-by-one, or tensor-parallel size 1."
        )
    variant = getattr(args, "experimental_attention_variant", None)
    if variant == "gated_delta_net" and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise ValueError(
            f"--experimental-attention-variant {variant} with --tensor-model-parallel-size {args.tensor_model_parallel_size}: "
            "Megatron does not add up the gradients of its norm over the ranks (Megatron-LM 7452): add --sequence-parallel."
        )
    if args.text_data:
        others = ["--" + name.replace("_", "-") for name in OTHER_DATA if getattr(args, name, None)]
        if others:
            raise ValueError(f"--text-data is the data of a run, and so is {' and '.join(others)}: leave one of them out.")
        if args.tokenizer_type != "NullTokenizer":
            raise ValueError(
                f"--tokenizer-type {args.tokenizer_type} does not go with --text-data, whose tokens are bytes: leave it out."
            )
