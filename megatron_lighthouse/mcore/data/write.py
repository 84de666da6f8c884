"""Writing an indexed dataset, by Megatron's own builder, so that half of one is never found."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy


def write_dataset(prefix: str, documents: Iterable[numpy.ndarray[Any, Any]], dtype: type[numpy.number[Any]]) -> tuple[int, int]:
    """Write `prefix`.bin and `prefix`.idx, which appear when both are whole; answers how many documents and tokens.

    Args:
        documents: the tokens of each, [length] integers that `dtype` holds.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

    partial, count, tokens = f"{prefix}.partial-{os.getpid()}", 0, 0
    try:
        builder = IndexedDatasetBuilder(get_bin_path(partial), dtype=dtype)
        for document in documents:
            builder.add_document(document, [len(document)])
            count, tokens = count + 1, tokens + len(document)
        builder.finalize(get_idx_path(partial))
        # the index goes last: where it is, the whole dataset is
        os.replace(get_bin_path(partial), get_bin_path(prefix))
        os.replace(get_idx_path(partial), get_idx_path(prefix))
    finally:
        for path in (get_bin_path(partial), get_idx_path(partial)):
            Path(path).unlink(missing_ok=True)
    return count, tokens
