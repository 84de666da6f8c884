"""Whether the attention over the gathered rows can be the one that `--lighthouse-inner` forces. Imports no torch."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_lighthouse.mcore.command_line.settings import head_dims, own_comm_types, settings_from
from megatron_lighthouse.options import in_flags
from megatron_lighthouse.softmax import names
from megatron_lighthouse.variants import VARIANTS

if TYPE_CHECKING:
    from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings


def problems(config: Any, settings: LighthouseSettings, documents: bool = False) -> Iterator[str]:
    """Why not, by the model and its layout.

    Args:
        config: a TransformerConfig, or what has those of its fields that are known.
        documents: whether rows hold packed documents.
    """
    if not _forced(config, settings):
        return
    name, kinds = settings.config.inner, {*own_comm_types(config, settings)} - {"a2a"}
    known = names.OVER_SHARDED_DOCUMENTS if documents else names.OVER_SHARDS
    dim = head_dims(config)[0] if hasattr(config, "hidden_size") else 8
    sinks = getattr(config, "softmax_type", "vanilla") != "vanilla"
    found = [names.te_problem(name)]
    if kinds:
        found.append(names.shards_problem(name, known, dim))
    elif documents and sinks:
        found.append(names.document_sinks_problem(name))
    yield from map(in_flags, filter(None, found))


def device_problems(args: Namespace, major: int) -> Iterator[str]:
    """Why not, by the GPUs of the job.

    Args:
        args: Megatron's, not validated.
        major: compute capability of the GPUs; 0: there are none.
    """
    if not VARIANTS[args.attention].selects:
        return
    try:
        settings = settings_from(args)
    except ValueError:  # said elsewhere
        return
    if _forced(args, settings) and args.hidden_size and args.num_attention_heads:
        half, repeats = bool(args.bf16 or args.fp16), bool(args.deterministic_mode)
        found = names.device_problem(settings.config.inner, major, head_dims(args), half, repeats)
        yield from [in_flags(found)] if found else []


def is_forced(args: Namespace) -> bool:
    """Whether a run's layers have the inner attention that it names, by arguments that Megatron has not validated."""
    try:
        return _forced(args, settings_from(args))
    except ValueError:  # said elsewhere
        return False


def _forced(config: Any, settings: LighthouseSettings) -> bool:
    """Whether layers have an inner attention of this project's own, and its name is given."""
    if not settings.attention.selects or not settings.base.native or settings.config.inner == "auto":
        return False
    engine = config.transformer_impl == "transformer_engine"
    return not settings.attention.base_attends(settings.config, engine, config.transformer_impl == "local")
