"""One forward step of GPT pre-training: batch, model, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_lighthouse.mcore.attention.document_rotary import rotate_by
from megatron_lighthouse.mcore.attention.packed import packed
from megatron_lighthouse.mcore.command_line import conversations
from megatron_lighthouse.mcore.command_line.documents import asked as documents_asked
from megatron_lighthouse.mcore.data.conversations import real_tokens
from megatron_lighthouse.mcore.data.documents import documents_in, tokens_of_rank
from megatron_lighthouse.mcore.loop import finite
from megatron_lighthouse.mcore.loop.further_tokens import ends_of
from megatron_lighthouse.mcore.loop.loss_weights import weighted
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.sequence.layout import Layout

FIELDS = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask")
OF_DOCUMENTS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")
stragglers = StragglerDetector()
"""That of the process, which --log-straggler turns on; to construct it again would turn it off."""
WEIGHTS, REAL = "token_weights", "real_tokens"
ROW_TOKENS = "tokens a row"
"""What is logged where rows hold padding: the mean of their real tokens."""


def forward_step(data: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Megatron's forward step: the model's output on this pipeline stage, and the function that makes it a loss."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    args = get_args()
    size = args.micro_batch_size if model.training else args.eval_micro_batch_size
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    with stragglers(bdata=True):
        batch, packing = _batch(data, vp_stage, size)
    timers("batch-generator").stop()
    tokens, position_ids, attention_mask, labels, loss_mask = (batch.get(name) for name in FIELDS)
    more = {}
    if packing is not None:
        documents, rows = packing
        if model.training and not vp_stage:  # by which Megatron counts what attention computes, once a micro-batch
            update_seqlen_stats_from_cu_seqlens(documents.cu_seqlens)
        positions = documents.positions[rows]
        rotate_by(get_attr_wrapped_model(model, "decoder", return_model_obj=True), positions)
        ends = ends_of(documents, tokens, get_tokenizer().eod) if args.mtp_num_layers and tokens is not None else None
        more["packed_seq_params"] = packed(documents, args.seq_length, ends, positions)
    with stragglers, weighted(loss_mask if args.calculate_per_token_loss else batch.get(WEIGHTS)):
        output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask, **more)
    return output, partial(loss_function, loss_mask, batch.get(WEIGHTS), real=batch.get(REAL) if model.training else None)


def loss_function(
    loss_mask: Tensor | None, weights: Tensor | None, output: Tensor, real: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What Megatron's schedule makes the loss of, on the last pipeline stage: a sum, and by what it divides it.

    The mean over sequences of the mean over each sequence's counted tokens (ours; as Megatron's where all tokens count), no
    matter how context parallelism, data parallelism or micro-batches deal them out. With --calculate-per-token-loss the mean
    over all counted tokens of the batch, as in Megatron.

    Args:
        loss_mask: [b, s], 1 where a token counts.
        weights: [b, s], the `token_weights`.
        output: [b, s] fp32 losses, in nats.
        real: [b, s] bool, which tokens are no padding, where rows hold some.
    """
    assert loss_mask is not None  # the last stage has the batch
    assert weights is not None
    args, losses, mask = get_args(), output.view(-1).float(), loss_mask.view(-1).float()
    total, counted = torch.sum(losses * mask), mask.sum().detach()
    if args.calculate_per_token_loss:
        loss, divisor = total, counted.to(torch.int)
    else:  # the gradients are averaged over context-parallel ranks, each with its part of every sequence
        loss = torch.sum(losses * weights.view(-1)) * args.context_parallel_size
        divisor = torch.full_like(counted, weights.size(0), dtype=torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=lambda value: ~torch.isfinite(value),
            message=finite.LOSS,
            tolerance=0.0,
            fatal=True,
        )
    # what is logged is divided by what all ranks count, which may be nothing: then 0, not 0/0
    logged = {"lm loss": torch.stack([total.detach(), counted + torch.finfo(counted.dtype).tiny])}
    if real is not None:  # of each context-parallel rank a part
        logged[ROW_TOKENS] = torch.stack([real.sum().float(), counted.new_tensor(real.size(0) / args.context_parallel_size)])
    return loss, divisor, logged


def token_weights(loss_mask: Tensor) -> Tensor:
    """How much each token counts in the mean of its sequence: a row sums to 1, or to 0 where no token counts.

    Args:
        loss_mask: [b, N], 1 where a token counts.

    Returns:
        [b, N], fp32.
    """
    mask = loss_mask.float()
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1)


def _batch(
    data: Iterator[dict[str, Tensor]], vp_stage: int | None, micro_batch_size: int
) -> tuple[dict[str, Tensor | None], tuple[Documents, Tensor] | None]:
    """This rank's part of the next batch, empty on the pipeline's middle stages; and what all stages know of packed rows: their
    documents, and [b, s/cp] the tokens of this rank."""
    args = get_args()
    packs = documents_asked(args)
    if not packs and not is_first_or_last_pipeline_stage(vp_stage):
        return {}, None
    first_of_tp = mpu.get_tensor_model_parallel_rank() == 0
    batch: dict[str, Tensor | None] = {}
    if first_of_tp:
        sample = next(data)
        given = (*FIELDS, *OF_DOCUMENTS) if packs else FIELDS
        batch = {name: sample[name].cuda(non_blocking=True) if name in sample else None for name in given}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packs,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    found = {name: batch.pop(name, None) for name in OF_DOCUMENTS}
    if (loss_mask := batch.get("loss_mask")) is not None:  # of whole sequences, before they are cut
        batch[WEIGHTS] = token_weights(loss_mask)
    if conversations.asked(args) and (labels := batch.get("labels")) is not None:
        batch[REAL] = real_tokens(labels, get_tokenizer().pad)
    if not packs:
        return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()), None
    bounds = found["cu_seqlens"]
    assert bounds is not None
    documents = documents_in(bounds)
    layout = Layout(mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank())
    rows = tokens_of_rank(documents, micro_batch_size, layout)
    if not is_first_or_last_pipeline_stage(vp_stage):
        return {}, (documents, rows)
    return {name: None if x is None else x.flatten()[rows] for name, x in batch.items()}, (documents, rows)
