"""Whether the tokens of the data are in the model's vocabulary, as far as the command line says how great it is.

A token beyond it ends a run on a GPU with an assertion of CUDA's, or reads another rank's row. Imports no Megatron.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_lighthouse.mcore.data import indexed, tokenizers
from megatron_lighthouse.mcore.data.blends import Here
from megatron_lighthouse.mcore.data.text import PADDED_VOCABULARY
from megatron_lighthouse.mcore.data.tokenizers import NULL


def size_of(args: argparse.Namespace) -> tuple[str, int] | None:
    """The flag that says how many tokens there are, and how many; None where a tokenizer does."""
    if args.tokenizer_type in NULL and args.vocab_size and args.text_data is None:
        return "--vocab-size", args.vocab_size
    return ("--padded-vocab-size", args.padded_vocab_size) if args.padded_vocab_size else None


def rows(args: argparse.Namespace, here: Here) -> int | None:
    """How many tokens the model has rows for, before padding, as Megatron-core 0.19 reads the words.

    Args:
        args: as the words say, not validated.

    Returns:
        None where that is the size of a tokenizer that is not here, or nothing says it.
    """
    if args.text_data:
        return PADDED_VOCABULARY
    if args.padded_vocab_size:
        return int(args.padded_vocab_size)
    size: int | None = args.vocab_size
    if not args.pad_vocab_size or tokenizers.takes_size(args.tokenizer_type):
        return size or (tokenizers.MOST_OF_TIKTOKEN if args.tokenizer_type == tokenizers.TIKTOKEN else None)
    return tokenizers.tokens(args, here)


def size_problems(args: argparse.Namespace) -> Iterator[str]:
    """Sizes of the vocabulary that contradict each other."""
    if args.text_data is not None:
        return
    vocab, padded, end = args.vocab_size, args.padded_vocab_size, args.null_tokenizer_eod_id
    if padded and vocab and padded < vocab:
        least = _whole(vocab, args)
        yield f"--padded-vocab-size {padded} must be at least --vocab-size {vocab}: leave it out, or use {least} or more."
    if padded and padded % args.tensor_model_parallel_size:
        size = args.tensor_model_parallel_size
        yield (
            f"--padded-vocab-size {padded} must be a multiple of --tensor-model-parallel-size {size}: use "
            f"{_whole(padded, args)}, or leave it out."
        )
    if args.tokenizer_type in NULL and vocab and end is not None and not 0 <= end < vocab:
        yield f"--null-tokenizer-eod-id {end} must be below --vocab-size {vocab}, and not negative: use {vocab - 1}."


def problems(args: argparse.Namespace, name: str, prefix: str, here: Here) -> Iterator[str]:
    """Of a dataset whose files are whole, that `name` names."""
    if (size := size_of(args)) is None:
        return
    flag, tokens = size
    least, greatest = indexed.ids(here(prefix + ".idx"), here(prefix + ".bin"))
    if least < min(0, args.null_tokenizer_pad_id):
        yield f"{name} {prefix} has a token {least}, and none is below 0: write the dataset again, as uint16 or int32."
    elif greatest >= tokens:
        enough = greatest + 1 if flag == "--vocab-size" else _whole(greatest + 1, args)
        yield (
            f"{name} {prefix} has a token {greatest:,}, beyond {flag} {tokens}: use {enough} or more, the size of the "
            "tokenizer that wrote it."
        )


def _whole(tokens: int, args: argparse.Namespace) -> int:
    """As many tokens, and more where tensor-parallel ranks cannot share them out."""
    size: int = args.tensor_model_parallel_size
    return -(-tokens // size) * size
