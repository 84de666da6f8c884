"""FP8 attention (`--fp8-dot-product-attention`): whether Transformer Engine's can be what attends. Imports no Megatron.

Rules of Transformer Engine 2.20 and cuDNN 9, of training: `dot_product_attention/utils.py` there, `get_attention_backend`, and
`common/fused_attn/fused_attn.cpp`. It itself says at the first step, and not why, that no backend is left.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lighthouse.lighthouse.config import flag
from megatron_lighthouse.mcore.command_line import documents, named
from megatron_lighthouse.mcore.command_line.settings import head_dims
from megatron_lighthouse.options import as_words

if TYPE_CHECKING:
    from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings

FLAG = "--fp8-dot-product-attention"
RECIPE = "NVTE_DPA_FP8_RECIPE"
"""By which Transformer Engine gives attention another recipe than linear layers have; read when it is imported."""
UNPICKLE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
"""Without which newer releases load no scales of delayed scaling, which they pickle."""
ON_HOPPER = 128
"""Channels of a key and of a value, and no others: the backward there has no more."""
NEWEST_LIMIT, STEP = 128, 16
"""On Blackwell up to so many, in multiples."""
LEAST_CUDNN, LEAST_TO_REPEAT = 90700, 91900
"""From which on rows need not come in blocks of 128; whose backward repeats to the bit."""
EXPERIMENTAL = (
    f"lighthouse: {FLAG} is experimental: what it costs in loss is not settled. After 300 steps of a small model it was 0.068 "
    "nats from bf16's loss, where 0.01 was the bar, and 0.001 from that of FP8 linear layers alone. The attention is "
    "Transformer Engine's, cuDNN's in FP8, with the scales of the step before; at the first step these are 1."
)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--fp8-dot-product-attention`: Megatron 0.19 has it in a model's configuration, and no flag for it."""
    if FLAG not in parser._option_string_actions:
        parser.add_argument_group("fp8 attention").add_argument(
            FLAG,
            action="store_true",
            help="With --fp8-format: attend in FP8 too, by Transformer Engine and cuDNN; in Lighthouse layers, to the gathered "
            "rows. Experimental.",
        )
    return parser


def asked(config: Any) -> bool:
    return bool(getattr(config, "fp8_dot_product_attention", False))


def problems(config: Any, settings: LighthouseSettings | None = None) -> Iterator[str]:
    """Why not, by the model and how it is trained.

    Args:
        config: a TransformerConfig, or what `config_of` makes of arguments.
        settings: of an attention of this project; None for Megatron's own.
    """
    if settings is not None and getattr(config, "fp8_multi_head_attention", False):
        yield (
            "fp8_multi_head_attention would hand over queries, keys and values in FP8, of which no rows can be pooled: use "
            f"{FLAG}, which casts what is gathered."
        )
    if not asked(config):
        return
    if not config.fp8:
        yield f"{FLAG} is read with --fp8-format alone: add --fp8-format hybrid, or leave it out."
    if problem := _not_the_engines(config, settings):
        yield problem
        return
    if config.fp8 and (problem := recipe_problem(_recipe(config), os.environ.get(RECIPE, ""))):
        yield problem
    yield from _attention(config)
    if _recomputed(config):
        yield (
            f"{FLAG} with --recompute-modules core_attn: Megatron attends again outside of FP8, so that gradients would be of "
            "another forward: leave core_attn out, or use --recompute-granularity full."
        )
    if further := getattr(config, "mtp_num_layers", None):
        yield f"{FLAG} with --mtp-num-layers {further}: checkpoints would not hold their scales: leave one of them out."
    if (graphs := getattr(config, "cuda_graph_impl", "none")) != "none":
        yield f"{FLAG} with --cuda-graph-impl {graphs} has not been tried: leave one of them out."


def run_problems(args: argparse.Namespace, config: Any) -> Iterator[str]:
    """Why not, by the data and the checkpoints of a run."""
    if asked(config) and documents.asked(args):
        yield f"{FLAG} attends to whole sequences, and {documents.flag_of(args)} packs documents: leave one of them out."
    delayed = getattr(config, "fp8", None) and (_recipe(config) == "delayed" or asked(config))
    stored = getattr(args, "save", None) or getattr(args, "load", None)
    if delayed and stored and os.environ.get(UNPICKLE) != "1" and _asks_to_unpickle():
        yield (
            f"--fp8-format {config.fp8} with --save or --load: this Transformer Engine does not load the "
            f"scales of a checkpoint, which it pickles, unless it is told to: set {UNPICKLE}=1 in the environment, if you "
            "trust your checkpoints, or use --fp8-recipe tensorwise without FP8 attention."
        )


def device_problems(config: Any, major: int, cudnn: int | None = None) -> Iterator[str]:
    """Why not, by the GPUs.

    Args:
        config: a TransformerConfig, or Megatron's arguments, not validated.
        major: compute capability; 0: there are none.
        cudnn: its release as cuDNN counts, 91900 for 9.19; None where it is not known.
    """
    if not asked(config):
        return
    if major not in (9, 10):
        here = f"these are of {major}" if major else "there is none here"
        yield f"{FLAG} needs GPUs of compute capability 9 or 10, and {here}: leave it out."
        return
    repeats = getattr(config, "deterministic_mode", False)
    if cudnn is not None and cudnn < (least := LEAST_TO_REPEAT if repeats else LEAST_CUDNN):
        why = " with --deterministic-mode" if repeats else ""
        yield f"{FLAG}{why} needs cuDNN {least // 10000}.{least // 100 % 100}, and this is {cudnn}: update it, or leave it out."
    if not (config.hidden_size and config.num_attention_heads):  # as a checkpoint says
        return
    dims = head_dims(config)
    if major == 9 and dims != (ON_HOPPER, ON_HOPPER):
        yield (
            f"{FLAG} on Hopper takes heads of {ON_HOPPER} channels, and these have {_both(dims)}: use "
            f"{_heads_of(config, ON_HOPPER)}, or leave it out."
        )
    if major == 10 and any(dim > NEWEST_LIMIT or dim % STEP for dim in dims):
        yield (
            f"{FLAG} takes heads of up to {NEWEST_LIMIT} channels, a multiple of {STEP}, and these have {_both(dims)}: use "
            f"{_heads_of(config, NEWEST_LIMIT)}, or leave it out."
        )


def recipe_problem(recipe: str, of_attention: str) -> str | None:
    """Why attention has no FP8 by --fp8-recipe, and by what the environment says of it.

    On Hopper cuDNN has FP8 attention by delayed scaling alone; Megatron gives attention none by some recipes.
    """
    delayed = "DelayedScaling"
    if of_attention not in ("", delayed):
        return f"{FLAG} with {RECIPE}={of_attention}: attention has FP8 here by delayed scaling: set {RECIPE}={delayed}."
    if recipe == "delayed" or (recipe == "tensorwise" and of_attention == delayed):
        return None
    return (
        f"{FLAG} with --fp8-recipe {recipe}: attention has FP8 here by delayed scaling: use --fp8-recipe delayed, or "
        f"--fp8-recipe tensorwise with {RECIPE}={delayed} in the environment."
    )


def _not_the_engines(config: Any, settings: LighthouseSettings | None) -> str | None:
    """Why it is not Transformer Engine's attention that attends."""
    if config.transformer_impl != "transformer_engine":
        return f"{FLAG} is done by Transformer Engine's attention: use --transformer-impl transformer_engine, or leave it out."
    if settings is None or settings.attention.base_attends(settings.config, True, False):
        return None
    if settings.attention.selects and settings.base.native:
        inner = settings.config.inner
        return f"{FLAG} is done by Transformer Engine's attention, and {flag('inner')} {inner} takes another: leave one out."
    own = named.asked_by(settings.base, settings)
    return f"{FLAG} is done by Transformer Engine's attention, which {own} does not call: leave it out."


def _attention(config: Any) -> Iterator[str]:
    """What cuDNN's attention has not in FP8, or what keeps Transformer Engine from cuDNN's."""
    if (softmax := getattr(config, "softmax_type", "vanilla")) != "vanilla":
        yield f"{FLAG} with --softmax-type {softmax}: there are no sinks in FP8: leave one of them out."
    if window := getattr(config, "window_size", None):
        yield f"{FLAG} with {as_words('--window-size', window)}: there are no windows in FP8: leave one of them out."
    backend = getattr(config, "attention_backend", None)
    backend = getattr(backend, "name", backend)
    if backend in ("flash", "unfused"):
        yield f"{FLAG} with --attention-backend {backend}: FP8 is cuDNN's: use fused or auto."
    elif os.environ.get("NVTE_FUSED_ATTN") == "0":
        yield f"{FLAG} with NVTE_FUSED_ATTN=0: FP8 is cuDNN's: unset it."


def _recomputed(config: Any) -> bool:
    """Whether the core attention alone is computed again in backward; unvalidated arguments name it otherwise."""
    selective = config.recompute_granularity == "selective" or getattr(config, "recompute_activations", False)
    return bool(selective) and "core_attn" in (config.recompute_modules or ["core_attn"])


def _asks_to_unpickle() -> bool:
    """Whether the installed Transformer Engine is one that wants to be told; not imported for it, which takes seconds."""
    found = find_spec("transformer_engine")
    folders = (found and found.submodule_search_locations) or ()
    return any((Path(folder) / "pytorch" / "_extra_state.py").exists() for folder in folders)


def _recipe(config: Any) -> str:
    """Of Megatron's enumeration, or in a word."""
    return str(getattr(config.fp8_recipe, "value", config.fp8_recipe))


def _both(dims: tuple[int, int]) -> str:
    return str(dims[0]) if dims[0] == dims[1] else f"{dims[0]} and values of {dims[1]}"


def _heads_of(config: Any, dim: int) -> str:
    """The options that give heads so many channels."""
    if getattr(config, "multi_latent_attention", False):
        return f"--qk-head-dim {dim // 2} --qk-pos-emb-head-dim {dim // 2} --v-head-dim {dim}"
    return f"--kv-channels {dim}"
