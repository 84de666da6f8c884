"""`python -m megatron_lighthouse.mcore.data.prepare`: text or JSON lines as an indexed dataset, PREFIX.bin and PREFIX.idx.

A file whose name ends in .jsonl, .ndjson or .json has an object a line, each a document; any other is one document. Either may
be packed (.gz). Tokens are made by the tokenizer that Megatron's flags name (--tokenizer-type, --tokenizer-model, …), and each
document ends with its end-of-document token. A run then takes --data-path PREFIX, with the same tokenizer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

import numpy

from megatron_lighthouse.mcore.data.plain import START, are_json_lines, named
from megatron_lighthouse.usage import WRONG, Parser, as_flag, unknown_flag

LINES = (".jsonl", ".ndjson", ".json")
OF_TOKENIZERS = (
    *("tokenizer_", "vocab_", "merge_", "null_tokenizer_", "tiktoken_", "special_tokens", "trust_remote_code"),
    *("chat_template", "metadata_path", "sft_tokenizer_"),
)
"""How Megatron's arguments begin that a tokenizer is built by."""
NO_TEXT = "--input {} is no text in UTF-8 ({}): convert it, or leave it out."
EVERY = 100_000
"""Documents from one line of progress to the next."""
_tokenizer: Any = None


def main(argv: Sequence[str] | None = None) -> int:
    """Write the dataset; answers an exit status."""
    parser = Parser(
        prog="python -m megatron_lighthouse.mcore.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Beside these, Megatron's flags of tokenizers.",
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="text or JSON lines, in this order")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="of the two files that are written")
    parser.add_argument("--json-key", default="text", help="what of an object is the text; default: %(default)s")
    parser.add_argument("--no-end-of-document", action="store_true", help="end no document with that token")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that make tokens; default: %(default)s")
    from megatron_lighthouse.mcore.command_line import flags

    options, words = parser.parse_known_args(argv)
    args, wrong = tokenizer_arguments(words, parser._option_string_actions)
    wrong += flags.apart(problems(options, args), args.malformed)
    try:
        if wrong:
            raise ValueError("\n".join(wrong))
        count, tokens, empty = prepare(options, args)
    except ValueError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return WRONG
    left = f"; {empty:,} without text left out" if empty else ""
    print(
        f"{options.output}.bin and .idx: {count:,} documents, {tokens:,} tokens{left}. Train with --data-path {options.output}"
    )
    return 0


def tokenizer_arguments(words: Sequence[str], own: Mapping[str, argparse.Action]) -> tuple[argparse.Namespace, list[str]]:
    """Megatron's arguments, of which the words may name those of tokenizers alone; and what is wrong with the words.

    Args:
        own: by flag, what this command's parser does with it: one of these may be meant.
    """
    from megatron_lighthouse.mcore.command_line import flags

    made = flags.parser(lambda parser: parser)
    rest = made.parse_known_args(words)[1]
    args, wrong = flags.parse(words, lambda parser: parser, strict=False)
    of_tokenizers = {flag: how for flag, how in made._option_string_actions.items() if how.dest.startswith(OF_TOKENIZERS)}
    unknown = [unknown_flag(word, {**own, **of_tokenizers}) for word in rest if word.startswith("-")]
    wrong += unknown
    if rest and not unknown:
        wrong += [f"{' '.join(rest)} follows no flag that takes it: leave it out."]
    wrong += [
        f"{as_flag(name)} is no flag of a tokenizer: leave it out."
        for name in sorted(args.said)
        if not name.startswith(OF_TOKENIZERS)
    ]
    args.rank, args.text_data = 0, None
    return args, wrong


def problems(options: argparse.Namespace, args: argparse.Namespace) -> Iterator[str]:
    """Files that are not there, or one that is, a folder that cannot be made, a tokenizer that cannot be built."""
    from importlib.util import find_spec

    from megatron_lighthouse.mcore.data import tokenizers

    yield from (f"--input {path} is no file: give text, or JSON lines." for path in options.input if not Path(path).is_file())
    if Path(f"{options.output}.idx").exists():
        yield f"--output {options.output}: {options.output}.idx is there already: name another, or remove it."
    above = next(path for path in Path(options.output).absolute().parents if path.exists())
    if not above.is_dir():
        yield f"--output {options.output}: {above} is no folder: name another."
    elif not os.access(above, os.W_OK):
        yield f"--output {options.output}: nothing can be written in {above}: name another folder."
    if options.workers < 1:
        yield f"--workers {options.workers} must be at least 1."
    there = [path for path in options.input if Path(path).is_file()]
    yield from (problem for path in there if (problem := kind_problem(path, options.json_key)))
    yield from tokenizers.problems(args, Path)
    for name in tokenizers.packages(args.tokenizer_type):
        if not find_spec(name):
            yield f"--tokenizer-type {args.tokenizer_type} needs the package {name}: pip install {name}."


def kind_problem(path: str, key: str) -> str | None:
    """Why the beginning of a file says that it is not what its name does; None where it is, or is not there."""
    name = path.removesuffix(".gz")
    try:
        with _opened(path) as file:
            if name.endswith(LINES):
                number, line = next(((n, line) for n, line in enumerate(file, 1) if line.strip()), (1, None))
                if line is not None:
                    _text_of(line, key, f"{path}, line {number}")
            elif are_json_lines(name, file.read(START).encode()):
                return (
                    f"--input {path} holds JSON lines, and would be one document by its name: let it end in "
                    f"{' or '.join(LINES)}, or give plain text."
                )
    except UnicodeDecodeError as error:
        return NO_TEXT.format(path, error)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        return f"--input {path} cannot be unpacked ({error}): pack it again, or leave it out."
    except ValueError as error:
        return str(error)
    except OSError:  # `problems` says so
        return None
    return None


def _opened(path: str) -> TextIO:
    return cast(TextIO, (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8"))


def prepare(options: argparse.Namespace, args: argparse.Namespace) -> tuple[int, int, int]:
    """Write the dataset; answers its documents and tokens, and how many documents had no text.

    Raises:
        ValueError: a tokenizer that ends no document, a line that is none of JSON, or no text at all.
    """
    from megatron_lighthouse.mcore.data.write import write_dataset
    from megatron_lighthouse.quiet import quiet_imports

    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import DType

        _build(args)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    end = None if options.no_end_of_document else getattr(_tokenizer, "eod", None)
    if end is None and not options.no_end_of_document:
        raise ValueError(f"--tokenizer-type {args.tokenizer_type} has no end-of-document token: add --no-end-of-document.")
    empty = written = 0

    def tokens() -> Iterator[numpy.ndarray[Any, Any]]:
        nonlocal empty, written
        for number, ids in enumerate(_ids(documents(options.input, options.json_key), options.workers), 1):
            if ids and not 0 <= min(ids) <= max(ids) < _tokenizer.vocab_size:
                raise ValueError(f"document {number} has token {max(ids)}, and the tokenizer {_tokenizer.vocab_size} of them.")
            if ids:
                yield numpy.array([*ids, *([] if end is None else [end])])
            empty += not ids
            written += bool(ids)
            if number % EVERY == 0:
                print(f"{number:,} documents", flush=True)
        if not written:  # a run would refuse such a dataset
            raise ValueError(f"--input {named(options.input)} holds no text: give files that hold some. Nothing is written.")

    return *write_dataset(options.output, tokens(), DType.optimal_dtype(_tokenizer.vocab_size)), empty


def documents(paths: Iterable[str], key: str) -> Iterator[str]:
    """The texts of files, one after another, each of the kind that its name says (`kind_problem`).

    Raises:
        ValueError: a file that is no UTF-8, or a line that is no object with such a text.
    """
    for path in paths:
        with _opened(path) as file:
            try:
                if not path.removesuffix(".gz").endswith(LINES):
                    yield file.read()
                    continue
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _text_of(line, key, f"{path}, line {number}")
            except UnicodeDecodeError as error:
                raise ValueError(NO_TEXT.format(path, error)) from error


def _text_of(line: str, key: str, where: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"--input {where}: no JSON ({error}): give an object a line, or another ending for text.") from error
    if not isinstance(found, dict) or not isinstance(found.get(key), str):
        has = f"it has {', '.join(found)}" if isinstance(found, dict) else "it is no object"
        raise ValueError(f"--input {where}: no text under {key!r}, {has}: give --json-key.")
    return str(found[key])


def _ids(texts: Iterator[str], workers: int) -> Iterator[list[int]]:
    """The tokens of each text, in order. No more texts are read ahead than the workers have at hand."""
    if workers == 1:
        yield from map(_encode, texts)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would not live on in a fork
    # its workers end by themselves; a Pool's are sent SIGTERM, which one that has just begun heeds as this process does
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        while some := [*islice(texts, 1000 * workers)]:
            yield from pool.map(_encode, some, chunksize=50)


def _build(args: argparse.Namespace) -> None:
    global _tokenizer
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    _tokenizer = build_tokenizer(args)


def _encode(text: str) -> list[int]:
    try:
        return list(_tokenizer.tokenize(text)) if text else []
    except ValueError as error:
        raise ValueError(
            f"--tokenizer-type makes no tokens of {text[:40]!r} ({error}): NullTokenizer reads numbers alone, and "
            "HuggingFaceTokenizer text."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
