"""The output of a Lighthouse layer is not kept for backward: it is scattered again when it is needed.

The projection that follows keeps its input, [s, b, np/tp * hn], for the gradient of its weights: as much as Q. But that input
is a sum of the gathered rows, and scattering again costs little more than writing N rows twice. So its memory is freed once the
projection has run, and filled again just before the projection's backward. The rows are fewer, and the inner attention keeps
them anyway, but where ranks deal them anew (context parallelism by a2a, or uneven chunks). Ours; Megatron's
CheckpointWithoutOutput does the same for norms. It saves nothing where something else holds that input (a quantised copy, an
output gate), and is left out where a saved-tensor hook may still read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor


def remember_source(output: Tensor, again: Callable[[], Tensor]) -> Tensor:
    """`output`, [s, b, np/tp * hn], marked with what makes it again: [s, b, np/tp, hn]."""
    output.lighthouse_source = again  # type: ignore[attr-defined]
    return output


def discard_input(module: torch.nn.Module, args: tuple[Any, ...], result: Any) -> None:
    """A forward hook of the projection: free its input, if that is a layer's output, until its backward."""
    source: Callable[[], Tensor] | None = getattr(args[0], "lighthouse_source", None) if args else None
    out = result[0] if isinstance(result, tuple) else result
    if source is None or not out.requires_grad or _is_held(out):
        return
    kept = args[0].data  # with a version of its own: what autograd saved has not changed when it is filled again
    storage = kept.untyped_storage()
    size = storage.nbytes()

    def restore(_: Tensor) -> None:
        storage.resize_(size)
        with torch.no_grad():
            kept.copy_(source().flatten(2))
        handle.remove()  # with it go the rows, and the output as soon as the projection has read it

    handle = out.register_hook(restore)
    storage.resize_(0)


def _is_held(x: Tensor) -> bool:
    """Whether memory must stay: under a CUDA graph's capture, or a hook on saved tensors (a checkpoint's, an offloader's)."""
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return capturing or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


@dataclass(frozen=True)
class ProjectionBuilder:
    """Builds the output projection of one layer, with the hook on it."""

    base: Any

    def __call__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> Any:
        projection = self.base(*args, config=config, **kwargs)
        if not config.cpu_offloading:  # which copies what is kept on a stream of its own, from memory that must stay
            projection.register_forward_hook(discard_input)
        return projection


def without_kept_output(linear_proj: Any) -> Any:
    """The builder of the projection in a layer spec, so that it does not keep a Lighthouse layer's output."""
    if isinstance(linear_proj, (ModuleSpec, ProjectionBuilder)):  # a spec is not called but read: left as it is
        return linear_proj
    return ProjectionBuilder(linear_proj)
