"""What the inner attention can be called, and where each runs. A file of its own, for `backends` imports torch, which a command
line need not."""

from __future__ import annotations

from collections.abc import Sequence

INNER = ("auto", "te", "fa4", "fa3", "cudnn", "fa2", "sdpa")
"""Those of `backends.BACKENDS`, and before them 'auto' and 'te' (Transformer Engine's, in its own layer spec)."""
MODULES = {"fa4": ("flash_attn.cute", "flash-attn-4"), "fa3": ("flash_attn_interface", "flash-attn-3")}
"""Of those that are no part of torch: what is imported, and what pip knows it by."""
OVER_SHARDS = ("fa4", "fa3", "cudnn", "fa2", "sdpa")
"""Those that return their log-sum-exp, by which shards are merged: `blocks.BLOCKS`."""
TRIED = {"fa4": 9, "fa3": None}
"""The major compute capability of GPUs that have run them so, with values as wide as keys; None: none has yet. Elsewhere they
are taken where they are forced, not by 'auto'."""
OVER_SHARDED_DOCUMENTS = ("fa2", "sdpa")
"""cuDNN's in torch compiles anew for each length, of which documents have many; FlashAttention 4 and 3 are not written here."""
UP_TO_256, BLACKWELL = range(8, 257, 8), (*range(8, 129, 8), 256)
"""Head dimensions of FlashAttention 3 on Hopper, and of FlashAttention 4 on Blackwell."""
HOPPER = (24, 32, 56, 64, 88, 96, 120, *range(128, 257, 8))
"""Of FlashAttention 4 on Hopper. Up to 128 its backward there fills heads up to multiples of 16, and what reads its gradient of
the queries to multiples of 32. Where these differ that is wrong: findings/flash_attention_4_pads_heads_in_two_ways.sh."""
NARROWER = (192, 128)
"""Of keys and values: what FlashAttention 3 and 4 take where they are not the same, DeepSeek's."""
REPEATS_TO = {"cudnn": 0, "fa3": 192}
"""The most channels with which a backward repeats to the bit, where that is not all."""
EQUAL_IF_GROUPED = ("flash-attn-4", 9)
"""On Hopper FlashAttention 4's backward asserts that they are the same where query heads share keys and values."""
FLASH_DIMS: dict[str, dict[int, Sequence[int]]] = {
    "fa4": {9: HOPPER, 10: BLACKWELL, 11: BLACKWELL},
    "fa3": {9: UP_TO_256},
}
"""The head dimensions that they take, by major compute capability: of those that FlashAttention 4's interface asserts."""


def untried(name: str, major: int, dims: tuple[int, int]) -> bool:
    """Whether no GPU of this compute capability has run it over shards, with keys and values of so many channels."""
    return name in TRIED and (TRIED[name] != major or dims[0] != dims[1])


def shards_problem(name: str, known: Sequence[str], dim: int) -> str | None:
    """Why a backend that is forced does not attend over shards; None where it does, or is 'auto'."""
    fits = [other for other in known if other != "fa2" or dim % 8 == 0]  # which torch pads only for whole sequences
    if name in (*fits, "auto", "te"):
        return None
    documents = " of packed documents" if tuple(known) == OVER_SHARDED_DOCUMENTS else ""
    of = f" with head dimension {dim}" if name in known else documents
    return (
        f"config.inner {name} does not attend over shards{of}: over several ranks use config.inner "
        f"{' or '.join(['auto', *fits])}, or cp_comm_type a2a, which attends to whole sequences."
    )


def te_problem(name: str) -> str | None:
    """Why a backend cannot be in layers that are not Transformer Engine's."""
    if name != "te":
        return None
    return (
        "config.inner te is the attention of Transformer Engine's layer spec: use it with Transformer Engine's layers, or "
        "config.inner auto."
    )


def document_sinks_problem(name: str) -> str | None:
    """Why a backend does not attend with sinks over packed documents."""
    if name in ("auto", "te", *OVER_SHARDED_DOCUMENTS):
        return None
    fits = " or ".join(["auto", *OVER_SHARDED_DOCUMENTS])
    return f"config.inner {name} takes no sinks over packed documents: use config.inner {fits}."


def device_problem(name: str, major: int, dims: tuple[int, int], half: bool, repeats: bool = False) -> str | None:
    """Why a backend cannot run, as far as settings tell; whether it is installed is seen where it runs.

    Args:
        major: compute capability of the GPUs; 0: none.
        dims: channels of a key and of a value.
        half: whether the model is in bf16 or fp16.
        repeats: whether runs are to repeat to the bit.
    """
    if name in ("auto", "te", "sdpa"):
        return None
    if not major:
        return f"config.inner {name} needs a GPU: use config.inner auto or sdpa."
    if not half:
        return f"config.inner {name} takes bf16 and fp16 alone: add --bf16, or use config.inner auto."
    if repeats and dims[0] > REPEATS_TO.get(name, dims[0]):
        beyond = f" with heads of {dims[0]} channels" if REPEATS_TO[name] else ""
        return f"config.inner {name} does not repeat to the bit{beyond}, as --deterministic-mode asks: use config.inner auto."
    if name not in FLASH_DIMS:
        return None
    if (takes := FLASH_DIMS[name].get(major)) is None:
        return f"config.inner {name} does not run on GPUs of compute capability {major}: use config.inner auto."
    if dims != NARROWER and (dims[0] != dims[1] or dims[0] not in takes):
        return f"config.inner {name} does not take heads of {dims[0]} channels and values of {dims[1]}: use config.inner auto."
    return None
