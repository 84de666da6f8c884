"""Lighthouse Attention: pool, score, select, gather, attend, scatter (arXiv 2605.06554)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.schemes import comm_type_problem
from megatron_lighthouse.given import check_sinks, check_types
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.lighthouse.given import check_own, check_selection
from megatron_lighthouse.lighthouse.layer import Attended, build
from megatron_lighthouse.lighthouse.packed.layer import PackedAttended, PackedLayer, build_packed
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.packed.sharded import ShardedAttended, ShardedPackedLayer
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.lighthouse.transforms import differentiable_once, refuse_transforms
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.softmax.backends import Attend
from megatron_lighthouse.softmax.inputs import check, made_from
from megatron_lighthouse.variant import DEFAULT_PLACE, Place

MOST_BUILT = 64
_built: dict[tuple[Any, ...], Any] = {}
"""Layers, by what they were built from."""


def lighthouse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: LighthouseConfig,
    *,
    streams: Sequence[Tensor] = (),
    around: Any = None,
    softmax_scale: float | None = None,
    rotary: Rotary | None = None,
    cp_group: ProcessGroup | None = None,
    cp_comm_type: str = "p2p",
    attend: Callable[..., Tensor] | None = None,
    selection: Selection | None = None,
    cu_seqlens: Tensor | Documents | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention through a selected set of pyramid entries.

    Args:
        query: [N, B, H, D], after RoPE; float64, float32, bfloat16 or float16, any strides. Megatron's "sbhd".
        key, value: [N, B, G, D], G dividing H; same dtype and device as the query. Values may have another D (MLA).
        streams: what else the attention `config.around` reads, each [N, B, H, D] and rotated as the queries, unless its page
            in the docs says otherwise.
        around: options of that attention, an object of its variant's `config`; its defaults if None. Not with `attend`.
        softmax_scale: of the inner attention, and of scorers that attend ('mass', 'summary' and 'dilated'); 1/sqrt(D) by
            default. With `attend`, which scales by itself, for those scorers alone.
        rotary: what queries and keys are rotated by. With it a pooled row stands at the last token of its window, as the
            authors now have it: see `Rotary`. Without it rows are averaged as they come, which is the paper's text.
        cp_group: the context-parallel ranks among which the sequence is sharded. Each of C ranks passes its zigzag shard,
            [N/C, B, ·, D]: of 2C equal chunks, rank r holds chunk r and chunk 2C-1-r.
        cp_comm_type: 'p2p', 'all_gather' or 'a2a': how the inner attention crosses ranks. See `sharded_attention`.
        attend: the inner attention, over this rank's rows under context parallelism, of queries, keys, values and streams; the
            backend that `config.inner` names by default.
        selection: attend to these entries instead of selecting (it carries no gradient either way): a `Selection`, such as
            `attended_rows` has, not the numbers that `lighthouse_select` gives. Not under context parallelism.
        cu_seqlens: [n + 1] int32 on the query's device: the row (B = 1) holds n documents, from token cu_seqlens[i] to the next
            one's, of any lengths. Each is as if it were alone, and rotated from its own first token or from the row's, which
            gives the same. Its budget goes by its length (`LighthouseConfig.document_tile`). The host reads it once,
            until it is written to; it may be `Documents` instead. `attend` then takes the `Documents` of the rows behind the
            values. Of C context-parallel ranks each passes its tokens in document zigzag (`Documents.rows_of_rank`), and the
            cu_seqlens of the whole row; 2C must divide N.
        sinks: [H], a logit a head, of a key that every row of the inner attention sees and whose value is 0 (gpt-oss); 0 is
            the softmax off by one. Differentiable. Not with `attend` or `cu_seqlens`.

    Returns:
        [N, B, H, D of values] in the query's dtype (under torch.autocast in the inner attention's); under context parallelism,
        this rank's shard of it: the same values at any number of ranks, up to the order of sums in the inner attention.
        Position j depends on tokens 0..j, once the selection is fixed; which windows are refined also depends on the later
        tokens of their tile, unless config.causal_selection.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, an N that does not fit the config or the ranks, or an inner
            attention that is forced and is not there; boundaries that do not begin with 0, increase and end at N, or that come
            with B > 1 or with a scorer that cannot. Before any collective, on every rank alike.
        TypeError: an argument of another type.
        RuntimeError: under torch.func or forward-mode differentiation; in backward, a second derivative.
    """
    check_types(query=query, key=key, value=value, config=config, softmax_scale=softmax_scale, rotary=rotary)
    check_types(cp_group=cp_group, attend=attend, cu_seqlens=cu_seqlens, sinks=sinks)
    # by name alone, here: under Transformer Engine's attention `attended_rows` may be given a scheme of its own
    if problem := comm_type_problem(cp_comm_type, 1, 1, 1):
        raise ValueError(problem)
    check_sinks(sinks, query, attend, cu_seqlens)
    place = Place(
        exchange=Exchange.over(cp_group),
        comm_type=cp_comm_type,
        scale=softmax_scale,
        base_attends=attend is not None,
        rotary=rotary,
        around=around,
        value_dim=value.shape[-1],
        sinks=sinks is not None,
    )
    if cu_seqlens is not None:
        return packed_rows(
            query, key, value, config, cu_seqlens, place, streams=streams, attend=attend, selection=selection
        ).scatter()
    return attended_rows(
        query, key, value, config, place, streams=streams, attend=attend, selection=selection, sinks=sinks
    ).scatter()


def attended_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: LighthouseConfig,
    place: Place = DEFAULT_PLACE,
    *,
    streams: Sequence[Tensor] = (),
    attend: Attend | None = None,
    selection: Selection | None = None,
    sinks: Tensor | None = None,
) -> Attended:
    """All steps of `lighthouse_attention` but the last, which must follow: the halo is under way until then.

    Args:
        place: says whether there are `attend` (`base_attends`) and `sinks`, and which D the values have.
    """
    refuse_transforms(query, key, value, *streams)
    check_own(query, key, value, config, streams, place)
    layer = _layer_for(build, config, query, key, value, place)
    if selection is not None:
        check_selection(selection, query, key.shape[2] // layer.heads_per_selection, layer.geometry, place.exchange)
    once = differentiable_once(query, key, value, *streams)
    return layer.attended(*once, attend=attend, selection=selection, sinks=sinks)


def packed_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: LighthouseConfig,
    cu_seqlens: Tensor | Documents,
    place: Place = DEFAULT_PLACE,
    *,
    streams: Sequence[Tensor] = (),
    attend: Callable[..., Tensor] | None = None,
    selection: Selection | None = None,
) -> PackedAttended | ShardedAttended:
    """As `attended_rows`, of a row of documents."""
    refuse_transforms(query, key, value, *streams)
    check_own(query, key, value, config, streams, place)
    layer, documents = _packed(config, query, key, value, cu_seqlens, place)
    if selection is not None:
        check_selection(selection, query, key.shape[2], Packing.of(documents, layer.rule), place.exchange)
    query, key, value, *streams = differentiable_once(query, key, value, *streams)
    if isinstance(layer, ShardedPackedLayer):
        return layer.attended(query, key, value, documents=documents, attend=attend)
    return layer.attended(query, key, value, *streams, documents=documents, attend=attend, selection=selection)


def _packed(
    config: LighthouseConfig,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | Documents,
    place: Place,
) -> tuple[PackedLayer | ShardedPackedLayer, Documents]:
    """The layer for such rows, and the documents of this one. Raises ValueError: see `lighthouse_attention`."""
    layer = _layer_for(build_packed, config, query, key, value, place)
    if query.shape[1] != 1:
        raise ValueError(
            f"cu_seqlens is of one row, and the batch (dimension 1) is {query.shape[1]}: lay rows end to end, "
            "[N * B, 1, H, D], and their documents likewise."
        )
    size = place.exchange.size if place.exchange else 1
    tokens = len(query) * size
    if isinstance(cu_seqlens, Tensor):
        documents = Documents.known(cu_seqlens, tokens, query.device)
    else:
        documents, where = cu_seqlens, cu_seqlens.cu_seqlens.device
        if documents.tokens != tokens or where != query.device:
            raise ValueError(
                f"cu_seqlens is of {documents.tokens} tokens on {where}, and the row of {tokens} on {query.device}."
            )
    if problem := documents.zigzag_problem(size):
        raise ValueError(problem)
    return layer, documents


def _layer_for[T](
    build: Callable[[LighthouseConfig, Tensor, Tensor, Place], T],
    config: LighthouseConfig,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    place: Place,
) -> T:
    """What `build` makes of inputs like these, built the first time that they come. Raises ValueError as `build`."""
    if torch.compiler.is_compiling():  # guards do what the table does
        check(query, key, value)
        return build(config, query, key, place)
    made = (build, config, place, *made_from(query, key, value))
    layer: T | None = _built.get(made)
    if layer is None:
        check(query, key, value)
        layer = build(config, query, key, place)
        if len(_built) >= MOST_BUILT:
            _built.clear()
        _built[made] = layer
    return layer


def lighthouse_select(
    query: Tensor,
    key: Tensor,
    config: LighthouseConfig,
    *,
    value: Tensor | None = None,
    softmax_scale: float | None = None,
    rotary: Rotary | None = None,
    cp_group: ProcessGroup | None = None,
    cu_seqlens: Tensor | Documents | None = None,
) -> Tensor:
    """The entries that `lighthouse_attention` attends to.

    Args:
        query, key: as for `lighthouse_attention`.
        value: likewise, for the scorers that read it: all but 'norm' and 'mass'.
        softmax_scale: likewise, for the scorers that attend by it: 'mass', 'summary' and 'dilated'.
        rotary: likewise, for the scorers that pool: 'summary' and 'mass'.
        cp_group: the context-parallel ranks among which the sequence is sharded.
        cu_seqlens: as for `lighthouse_attention`.

    Returns:
        [B, G, S] int64, in causal order, numbered in the concatenated pyramid (level 0 first), for G / `heads_per_selection`
        selections. Of C context-parallel ranks, each gets the [B, G, S/C] entries whose rows it attends to, chunk r and chunk
        2C-1-r of all S, numbered as without them. Of packed documents [1, G, S], document by document (S filled up to a
        multiple of 2C by -1): level 0 is the row's tokens, and then come the whole windows of all documents in turn, level 1
        first. A document that goes in whole, or the rest behind its last window, has none.

    Raises:
        ValueError: as `lighthouse_attention`, or a scorer that lacks the values.
        TypeError: an argument of another type.
    """
    check_types(query=query, key=key, config=config, softmax_scale=softmax_scale, rotary=rotary)
    check_types(cp_group=cp_group, cu_seqlens=cu_seqlens)
    if value is None:
        if SCORERS[config.scorer].reads_values:
            raise ValueError(f"config.scorer {config.scorer} reads the values: pass `value`.")
        value = key
    check_types(value=value)
    refuse_transforms(query, key, value)
    exchange = Exchange.over(cp_group)
    place = Place(exchange=exchange, scale=softmax_scale, base_attends=True, rotary=rotary, value_dim=value.shape[-1])
    if cu_seqlens is not None:
        packed, documents = _packed(config, query, key, value, cu_seqlens, place)
        if isinstance(packed, ShardedPackedLayer):
            return packed.select(query, key, value, documents)
        return packed.select(query, key, value, documents).indices
    selection, deal = _layer_for(build, config, query, key, value, place).select(query, key, value)
    if exchange is None:
        return selection.indices
    entries = _numbered_in_whole(selection.indices, selection.geometry, exchange.layout)
    if deal is None:
        return entries
    (dealt,) = deal.out.of_groups(entries.shape[1], entries.movedim(-1, 0).unsqueeze(-1))
    return dealt.squeeze(-1).movedim(0, -1).contiguous()


def _numbered_in_whole(entries: Tensor, here: Pyramid, layout: Layout) -> Tensor:
    """Numbers in the pyramid of a rank's two chunks, as numbers in that of the whole sequence."""
    whole = Pyramid(here.seq_length * layout.size, here.levels, here.pooling)
    early, late = layout.chunks
    numbered = torch.zeros_like(entries)
    for level in range(here.levels):
        entry, half = entries - here.offset(level), here.entries(level) // 2
        moved = torch.where(entry < half, entry + early * half, entry + (late - 1) * half) + whole.offset(level)
        numbered = torch.where((entry >= 0) & (entry < 2 * half), moved, numbered)
    return numbered
