"""Held-out loss of a checkpoint, by position: in the sequence, or of packed documents in each of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy

from megatron_lighthouse.mcore.command_line.documents import asked
from megatron_lighthouse.recipe import positions

if TYPE_CHECKING:
    from megatron_lighthouse.recipe.trained import Trained

type Array = numpy.ndarray[Any, Any]


def by_position(trained: Trained, tokens: Array) -> dict[str, Any]:
    """Mean loss by bucket and over all, and each sequence's, over evenly spread sequences. Every rank calls it.

    A sequence is named by where it starts in the text, and by the document in which its middle stands. Of packed documents
    positions are those in a document.
    """
    from megatron_lighthouse.recipe.trained import over_ranks

    args = trained.args
    edges = positions.bucket_edges(args.seq_length, args.loss_grid, args.loss_buckets)
    starts = positions.sequence_starts(len(tokens), args.seq_length, args.loss_sequences)
    end = trained.reader.end if asked(args) else None

    def compute(index: int) -> Array:
        sequence = tokens[starts[index] : starts[index] + args.seq_length + 1]
        losses = trained.token_losses(sequence)
        if end is not None:
            return positions.in_documents(losses, sequence[:-1], end, edges).ravel()
        return positions.bucket_means(losses, edges)

    found = over_ranks(len(starts), (len(edges) - 1) * (1 if end is None else 2), compute, "loss by position")
    if end is None:
        by_sequence = found
        means, errors = positions.mean_and_error(found)
        mean, error = positions.mean_and_error(found @ numpy.diff(edges) / args.seq_length)
    else:
        sums, counts = found.reshape(len(starts), 2, -1).swapaxes(0, 1)
        by_sequence = numpy.divide(sums, counts, out=numpy.full_like(sums, numpy.nan), where=counts > 0)
        means, errors = positions.ratio_and_error(sums, counts)
        mean, error = positions.ratio_and_error(sums.sum(1), counts.sum(1))
    documents = positions.documents(starts, args.seq_length, numpy.flatnonzero(tokens == trained.reader.end))
    columns = zip(edges[:-1], edges[1:], means.tolist(), errors.tolist(), strict=True)
    known = [row for row in columns if not math.isnan(row[2])]  # of places that no document has nothing is
    return {
        "unit": trained.reader.unit,
        "sequences": len(starts),
        "length": args.seq_length,
        "position_in": "sequence" if end is None else "document",
        "mean": float(mean),
        "standard_error": float(error),
        "buckets": [dict(zip(("start", "stop", "loss", "standard_error"), row, strict=True)) for row in known],
        "by_sequence": [
            {"starts_at": start, "document": document, **dict(zip(edges[:-1], row, strict=True))}
            for start, document, row in zip(starts, documents, by_sequence.tolist(), strict=True)
        ],
    }
