"""`python -m tests.mcore.logits_of OUT TOKENS ARGUMENTS`: what Megatron's dense model of a checkpoint answers."""

from __future__ import annotations

import sys
from typing import Any

import numpy
import torch


def main(out: str, tokens: str, arguments: list[str]) -> None:
    from megatron_lighthouse import cpu

    cpu.install()
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_lighthouse.mcore.command_line.arguments import model_config, use_attention, with_lighthouse_arguments
    from megatron_lighthouse.mcore.loop import hooks, pretrain

    hooks.adapt_machine()
    hooks.load_weights()
    sys.argv = [sys.argv[0], *arguments]
    args = parse_and_validate_args(extra_args_provider=with_lighthouse_arguments(pretrain.add_arguments))
    if args.multi_latent_attention:
        _take_channels()
    container = pretrain_cfg_container_from_args(args, use_attention(args, model_config(args)))
    training.initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    models, _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder, cfg_container=container, pg_collection=groups
    )
    given = torch.from_numpy(numpy.load(tokens)).unsqueeze(0)
    positions = torch.arange(given.shape[1]).unsqueeze(0)
    with torch.no_grad():
        # parallel attention of Megatron's own would need a mask: ones are what may not be seen
        mask = torch.ones(given.shape[1], given.shape[1], dtype=torch.bool).triu(1)[None, None]
        answer = models[0].eval()(given, positions, mask, runtime_gather_output=True)
    numpy.save(out, answer[0].float().numpy())


def _take_channels() -> None:
    """Megatron 0.19.2's own local attention does not know the channels that multi-latent attention names."""
    from megatron.core.transformer import dot_product_attention

    kind = dot_product_attention.DotProductAttention
    build, forward = kind.__init__, kind.forward

    def construct(self: Any, *given: Any, k_channels: int | None = None, v_channels: int | None = None, **named: Any) -> None:
        build(self, *given, **named)
        self.v_channels = v_channels

    def attend(self: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
        self.hidden_size_per_partition = value.shape[2] * value.shape[3]
        return forward(self, query, key, value, *rest, **named)

    kind.__init__, kind.forward = construct, attend


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
