"""Memory of the fullest rank, by part. Bytes, from what Megatron 0.19 with Transformer Engine keeps; no factor is fitted.

Each pipeline stage holds as many micro batches as there are stages from it on (1F1B). The first has the embedding, the last the
logits and the loss. With tensor parallelism sequence parallelism is on, so all of it is shared out. A layer's backward peaks in
its MLP or, when the MLP's activations are gone, in attention with what context parallelism exchanges: not both at once.
"""

from __future__ import annotations

from megatron_lighthouse.lighthouse.geometry import Geometry
from megatron_lighthouse.plan.run import Run
from megatron_lighthouse.plan.time import stage_parameters
from megatron_lighthouse.sequence.layout import Layout

BF16, FP32 = 2, 4
LOSS = {False: BF16 + FP32, True: BF16 + 2 * FP32}
"""Bytes of a logit at the peak, without and with --cross-entropy-loss-fusion (native).

Megatron's `VocabParallelCrossEntropy` makes one fp32 copy of the bf16 logits and works on it in place. Fused, its parts are
compiled one by one, and what was in place writes a second copy: an H200 that held both asked for the other in vain.
"""
OF_TILES = BF16 + FP32
"""Bytes of a parameter of the output, while its gradient is summed over tiles: one tile's, and the sum."""
PROMISED = 0.10
"""Greatest relative error against the measured peaks that the plan promises."""


def dense_activations(run: Run) -> float:
    """Kept by a layer for a micro batch.

    Both norms' inputs and outputs (4h), Q, K, V after RoPE, the output and fp32 log-sum-exp of attention, gate and up (2 FFN)
    and what goes down (FFN); what norms of queries and keys keep, and what another attention than softmax does (`Work.kept`).
    """
    model, columns = run.model, run.model.heads * run.model.head_dim * (1 + run.work.kept + _travelling(run))
    elements = 4 * model.hidden + model.qkv + columns + _mlp(run) + _normed(run)
    return run.tokens / run.tensor_parallel * (BF16 * elements + FP32 * model.heads)


def lighthouse_activations(run: Run, geometry: Geometry | None = None) -> float:
    """Kept by a Lighthouse layer: the gathered rows and their output in place of Q, K, V and the output; the map of entries.

    Of `geometry`, or the run's. The layer's own output too, unless it is freed and scattered again.
    """
    model = run.model
    columns = model.heads * model.head_dim * (run.work.tokens_kept + (not run.discard_output))
    other = run.tokens * BF16 * (4 * model.hidden + _mlp(run) + _normed(run) + columns)
    return (_gathered(run, geometry or run.geometry) + other) / run.tensor_parallel


def _gathered(run: Run, geometry: Geometry) -> float:
    """Gathered rows, their output, and the map, of all tensor-parallel ranks.

    The map has a 32-bit number for each entry of all levels and each key/value head; a causal selection keeps a second one, of
    the rows that it scatters.
    """
    model = run.model
    columns = model.heads * model.head_dim
    kept = columns * (run.work.rows_kept + _travelling(run))
    rows = geometry.gathered_length / run.context_parallel * (BF16 * (model.qkv + columns + kept) + FP32 * model.heads)
    maps = 1 + getattr(run.config, "causal_selection", False)
    entries = maps * geometry.pyramid_length / run.context_parallel * model.groups * FP32
    return rows + entries


def _travelling(run: Run) -> float:
    """See `Work.travelling_kept`."""
    return run.work.travelling_kept if run.context_parallel > 1 and run.cp_comm_type != "a2a" else 0.0


def _normed(run: Run) -> int:
    """Elements a token that norms of queries and keys keep: what they were given."""
    model = run.model
    return (model.heads + model.groups) * model.head_dim if run.options.get("qk_layernorm") else 0


def _mlp(run: Run) -> int:
    """Elements a token that the MLP keeps: gate and up, and what goes down. Its input is the norm's output."""
    return 0 if run.recompute == "mlp" or run.mlp_tile_tokens else 3 * run.model.ffn


def parts(run: Run, stage: int | None = None) -> dict[str, float]:
    """Bytes by part, of a pipeline stage from 0, or the fullest. Their sum is what Megatron logs as 'max allocated'."""
    if stage is None:
        stage = fullest(run)
    model, tp, cp, pp = run.model, run.tensor_parallel, run.context_parallel, run.pipeline_parallel
    parameters, shards = stage_parameters(run, stage), run.data_parallel * cp
    flight = min(pp - stage, run.micro_batches)
    ends, ours = run.stages[stage]
    share = run.tokens / tp
    of_ends = lighthouse_activations(run, run.edge) if run.edge else dense_activations(run)
    of_ours = lighthouse_activations(run, run.geometry) if ours else 0.0
    layer = max(of_ends if ends else 0.0, of_ours)
    kept = ends * of_ends + ours * of_ours
    # gradients of a layer's output, of what goes down, and of gate and up, by when what went down is gone; and what
    # --recompute-modules mlp, or a tile, makes again
    again, at_once = not _mlp(run), min(run.tokens, run.mlp_tile_tokens or run.tokens) / tp
    backward = mlp = BF16 * (share * model.hidden + at_once * (5 if again else 2) * model.ffn)
    if run.recompute == "full":  # its output is held instead of the first norm's input, which is what is kept
        kept, backward = (ends + ours) * share * BF16 * model.hidden, mlp + layer
    gone = share * BF16 * (2 * model.hidden + _mlp(run))  # the MLP's, and its norm's input and output
    beyond = max(0.0, _attention_backward(run) - gone - mlp)
    if run.recompute == "full":
        beyond = max(beyond, _attention_again(run) - backward)
    logits = _logits(run) if stage == pp - 1 else 0.0
    return {
        "parameters (bf16)": BF16 * parameters,
        f"gradients ({'fp32' if run.gradient_bytes == FP32 else 'bf16'})": run.gradient_bytes * parameters,
        "optimizer (fp32 master, two moments)": 3 * FP32 * parameters / shards,
        "activations": kept * flight,
        "backward of a layer": backward,
        "backward of its attention, beyond that": beyond,
        "logits and loss": max(0.0, logits - backward - beyond),  # not both at once
        "gathered for tensor parallelism": run.tokens * model.hidden * BF16 if tp > 1 else 0.0,
        "angles of RoPE (fp32)": run.tokens * model.head_dim * FP32 if run.rotated_columns else 0.0,
    }


def _logits(run: Run) -> float:
    """Those that are there at once, and their loss; with tiles, the output weight's gradient, and the layer's input and its."""
    at_once, hidden = run.logits_at_once * run.vocab_rank * LOSS[run.loss_fusion], run.model.hidden
    tiles = OF_TILES * run.vocab_rank * hidden + 2 * BF16 * run.tokens / run.tensor_parallel * hidden
    return at_once + (tiles if run.logits_at_once < run.tokens else 0.0)


def fullest(run: Run) -> int:
    """The pipeline stage, from 0, whose ranks need most."""
    stages = range(run.pipeline_parallel)
    return max(stages, key=lambda stage: sum(parts(run, stage).values())) if len(stages) > 1 else 0


def stage_name(run: Run) -> str:
    """The fullest pipeline stage, in words."""
    stage, last = fullest(run), run.pipeline_parallel - 1
    return {0: "first", last: "last"}.get(stage, f"{stage + 1}th")


def _attention_again(run: Run) -> float:
    """What a layer that is made again holds at its projection; a snapshot of a million tokens' step showed it.

    The gradient of its output, the first norm's output, the projection's; Q, K, V as one, Q and K turned, and what attention
    gives; with norms of queries and keys, what these were given and what they gave; and what is gathered.
    """
    model = run.model
    columns, turned = model.heads * model.head_dim, (model.heads + model.groups) * model.head_dim
    elements = 3 * model.hidden + model.qkv + turned + columns + 2 * _normed(run)
    gathered = _gathered(run, run.geometry) if run.lighthouse_layers else 0.0
    return (run.tokens * BF16 * elements + gathered) / run.tensor_parallel


def _attention_backward(run: Run) -> float:
    """What the backward of a layer's attention holds beyond what its forward kept.

    Gradients of the residual sum, the output, Q, K and V. Of the rows of the run's widest attention, which where all layers are
    Lighthouse are the gathered ones: cuDNN's gradient of Q in fp32 (a workspace: the measured peaks say so, no trace does), and
    what another attention than softmax holds (`Work.backward`); over several ranks also the sum over ranks of the gradients of
    Q, and what is exchanged: for p2p two sets of keys, values and their gradients (bf16 in Transformer Engine's ring, of dense
    layers; fp32 in ours), for all_gather all keys and values and their fp32 gradients, for a2a as much as the rank's own rows.
    """
    model, tp, cp = run.model, run.tensor_parallel, run.context_parallel
    columns, keys = model.heads * model.head_dim // tp, 2 * run.layer.groups * model.head_dim
    of_tokens = run.tokens * BF16 * (model.hidden / tp + 2 * columns + run.stream_columns // tp + keys)
    only = run.lighthouse_layers == model.layers
    gathered = max(geometry.gathered_length for geometry in (run.geometry, run.edge) if geometry) if only else run.seq_length
    rows = gathered / cp
    of_tokens += rows * BF16 * columns * run.work.backward
    if cp == 1:
        return of_tokens + rows * FP32 * columns
    sent = run.base.rows_sent(run.around, gathered, run.layer, Layout(cp, 0), "all_gather")["attend"][0]
    far = sent / (BF16 * (cp - 1) * rows)  # keys and values of a row, as they travel
    exchanged = {
        "p2p": far * 2 * (BF16 + (FP32 if only else BF16)),
        "all_gather": far * cp * (BF16 + FP32),
        "a2a": keys * 2 * BF16 * (1 + run.layer.heads / run.layer.groups),
    }
    return of_tokens + rows * ((FP32 + BF16) * columns + exchanged[run.cp_comm_type])


def total(run: Run) -> float:
    return sum(parts(run).values())


def fits(run: Run) -> bool:
    """Whether the peak is within what the device lets a run allocate."""
    return total(run) <= run.device.usable_bytes


def tight(run: Run) -> bool:
    """Whether it may not fit after all: with as much more as the promised error allows."""
    return total(run) > run.device.usable_bytes * (1 - PROMISED)
