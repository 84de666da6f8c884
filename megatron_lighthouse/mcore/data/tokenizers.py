"""What the tokenizer of a command line needs: packages, and files that are there. Imports no Megatron."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_lighthouse.mcore.data.blends import TOKENIZERS, Here, value

HUGGING_FACE = ("HuggingFaceTokenizer", "SFTTokenizer", "MultimodalTokenizer")
"""Those that take a folder, or a name of Hugging Face's hub."""
SENTENCE_PIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TIKTOKEN = "TikTokenizer"
PACKAGES = {
    **dict.fromkeys((*HUGGING_FACE, "GPT2BPETokenizer", "BertWordPieceLowerCase", "BertWordPieceCase"), ("transformers",)),
    **dict.fromkeys(SENTENCE_PIECE, ("sentencepiece",)),
    TIKTOKEN: ("tiktoken",),
}
"""What Megatron-core 0.19 builds each by; it depends on none of them."""
DOWNLOADED = {
    "GPT2BPETokenizer": ("--vocab-file", "--merge-file"),
    **dict.fromkeys(("BertWordPieceLowerCase", "BertWordPieceCase"), ("--vocab-file",)),
}
"""Of tokenizers that Megatron knows by name."""
NULL = ("NullTokenizer", "NullMultimodalTokenizer")
MOST_OF_TIKTOKEN = 2**17
"""Tokens that Megatron-core 0.19 takes of such a tokenizer where --vocab-size does not say."""
OF_HUGGING_FACE = "tokenizer.json"
OF_A_FOLDER = (OF_HUGGING_FACE, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
"""Of these one at least is in a folder that transformers makes a tokenizer of; *.tiktoken too."""
PIECE = b"\n"
"""With which a piece of a model of SentencePiece's begins: field 1 of the message, of so many bytes."""
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def packages(tokenizer_type: str | None) -> tuple[str, ...]:
    """What has to be installed for a --tokenizer-type."""
    return PACKAGES.get(tokenizer_type or "", ())


def downloaded(args: argparse.Namespace) -> tuple[str, ...]:
    """Files that Megatron fetches, by the package wget, where the words do not name them."""
    files = DOWNLOADED.get(args.tokenizer_type or "", ())
    return tuple(name for name in files if not getattr(args, name[2:].replace("-", "_"), None))


def file_of(args: argparse.Namespace, name: str, here: Here) -> str | None:
    """The path of a tokenizer's file; None where there is none, or a name of Hugging Face's hub."""
    path: str | None = value(args, name)
    if path is None or (_may_be_of_the_hub(args, name, path) and not here(path).exists()):
        return None
    return path


def takes_size(kind: str | None) -> bool:
    """Whether Megatron makes a tokenizer of --vocab-size; any other of a known type has a size of its own."""
    return kind is None or kind in (*NULL, TIKTOKEN)


def tokens(args: argparse.Namespace, here: Here) -> int | None:
    """How many tokens a tokenizer with a size of its own has, by its file; None where that is not here or does not say."""
    path = file_of(args, "--tokenizer-model", here)
    try:
        if path and args.tokenizer_type in HUGGING_FACE:
            return _tokens_of_folder(here(path))
        return _pieces(here(path).read_bytes()) if path and args.tokenizer_type in SENTENCE_PIECE else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _tokens_of_folder(folder: Path) -> int:
    """Of a Hugging Face tokenizer."""
    table = json.loads((folder / OF_HUGGING_FACE).read_text())
    vocabulary = table["model"]["vocab"]  # the number of each, or with its score in their order
    numbers = set(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
    return len(numbers | {token["id"] for token in table.get("added_tokens", ())})


def _pieces(model: bytes) -> int | None:
    """Of a model of SentencePiece's: the fields 1 with which its message begins. None where it begins otherwise."""
    at = found = 0
    while model[at : at + 1] == PIECE:
        length, shift, at = 0, 0, at + 1
        while True:  # seven bits a byte, the lowest first, as protobuf writes numbers
            byte = model[at]
            length, shift, at = length | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                break
        found, at = found + 1, at + length
    return found or None


def _may_be_of_the_hub(args: argparse.Namespace, name: str, path: str) -> bool:
    by_file = args.tokenizer_type in (*SENTENCE_PIECE, TIKTOKEN)
    return name == "--tokenizer-model" and not by_file and HUB_NAME.fullmatch(path) is not None


def problems(args: argparse.Namespace, here: Here) -> Iterator[str]:
    """What is wrong with the tokenizer that the words name, each in a sentence."""
    kind, model = args.tokenizer_type, args.tokenizer_model
    if args.text_data is None:
        if kind is None and not args.use_checkpoint_args:
            yield (
                "--tokenizer-type is missing: use HuggingFaceTokenizer with --tokenizer-model FOLDER, or NullTokenizer with "
                "--vocab-size."
            )
        elif kind in PACKAGES and kind not in ("GPT2BPETokenizer", "BertWordPieceLowerCase", "BertWordPieceCase") and not model:
            what = "FOLDER, or a name of Hugging Face's hub" if kind in HUGGING_FACE else "FILE"
            yield f"--tokenizer-type {kind} needs --tokenizer-model {what}: add it."
        elif kind in NULL and not args.vocab_size:
            yield f"--tokenizer-type {kind} needs --vocab-size: add the number of different tokens in the data."
    for name in TOKENIZERS:
        if path := file_of(args, name, here):
            yield from _file(name, path, here, kind)


def _file(name: str, path: str, here: Here, kind: str | None) -> Iterator[str]:
    """Whether a file is there, or a folder of a tokenizer's files, and not empty."""
    found = here(path)
    if not found.exists():
        use = ", or a name of Hugging Face's hub" if name == "--tokenizer-model" and kind in HUGGING_FACE else ""
        yield f"{name} {path} is not there: give a path that all nodes see{use}."
        return
    try:
        empty = not any(found.iterdir()) if found.is_dir() else not found.open("rb").read(1)
    except OSError as error:
        yield f"{name} {path} cannot be read ({error.strerror}): give a path that all nodes may read."
        return
    if empty:
        yield f"{name} {path} is empty: copy or write it again."
    elif kind in HUGGING_FACE and name == "--tokenizer-model":
        if not found.is_dir():
            yield f"{name} {path} is a file, and --tokenizer-type {kind} reads a folder: give {Path(path).parent}."
        elif not any((found / one).is_file() for one in OF_A_FOLDER) and not [*found.glob("*.tiktoken")]:
            yield f"{name} {path} holds no tokenizer (none of {', '.join(OF_A_FOLDER)}): give the folder of one."
        elif (found / OF_HUGGING_FACE).is_file() and (why := _no_json(found / OF_HUGGING_FACE)):
            yield f"{name} {path}: its {OF_HUGGING_FACE} is no JSON ({why}): copy or write it again."
    elif kind == TIKTOKEN and found.suffix != ".json":
        other = f", or use --tokenizer-type {HUGGING_FACE[0]}" if (found / OF_HUGGING_FACE).is_file() else ""
        yield f"{name} {path} must be a .json of ranks with --tokenizer-type {kind}: give that file{other}."
    elif kind in SENTENCE_PIECE:
        yield from _sentence_piece(name, path, found, kind)


def _no_json(path: Path) -> str | None:
    """Why a file is no JSON, in one line."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _is_sentence_piece(path: Path) -> bool:
    """Whether a file begins as a model of SentencePiece's does: with its first piece, field 1 of the message."""
    with path.open("rb") as file:
        start = file.read(2)
    return len(start) == 2 and start[:1] == PIECE and path.stat().st_size > 2 + start[1]


def _sentence_piece(name: str, path: str, found: Path, kind: str | None) -> Iterator[str]:
    """Whether a path may be a file of SentencePiece's; of a folder, which in it is, or who reads the folder."""
    models = sorted(str(Path(path) / file.name) for file in found.glob("*.model"))
    if found.is_dir() and models:
        yield f"{name} {path} is a folder, and --tokenizer-type {kind} reads a file: give {' or '.join(models)}."
    elif (found / OF_HUGGING_FACE).is_file():
        yield (
            f"{name} {path} holds {OF_HUGGING_FACE}, and no *.model that --tokenizer-type {kind} reads: use "
            f"--tokenizer-type {HUGGING_FACE[0]}."
        )
    elif found.is_dir():
        yield f"{name} {path} is a folder without *.model, and --tokenizer-type {kind} reads a file: give the model's."
    elif found.name == OF_HUGGING_FACE:
        yield f"{name} {path} is no *.model: use --tokenizer-type {HUGGING_FACE[0]} {name} {Path(path).parent}."
    elif not _is_sentence_piece(found):
        yield f"{name} {path} is no model of SentencePiece's, as --tokenizer-type {kind} reads: copy it again, or give another."
