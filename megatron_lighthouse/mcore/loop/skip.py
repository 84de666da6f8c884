"""An iteration that --iterations-to-skip leaves out: its data is read, and dropped.

Megatron's own deals the batches out first, for which packed documents on several ranks need Transformer Engine, and reads where
a middle stage of the pipeline has no data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine


def skip_step(_: Callable[..., Any], data: Any) -> None:
    """In place of Megatron's `dummy_train_step`. Every rank calls it.

    Args:
        data: this rank's iterator, one for each virtual stage, or None where it reads none.
    """
    while get_rerun_state_machine().should_run_forward_backward(data):
        for iterator in data if isinstance(data, list) else [data]:
            for _batch in range(get_num_microbatches() if iterator is not None else 0):
                next(iterator)
