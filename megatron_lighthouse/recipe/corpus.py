"""`python -m megatron_lighthouse.recipe.corpus --out FOLDER`: a corpus of text that any machine with this project has.

Documentation, source code and headers of Python's library and of installed packages, in long documents, some held out:

    FOLDER/train/*.txt       for --text-data of the entry point, which keeps its last twentieth for validation
    FOLDER/held-out/*.txt    documents that no training run reads, for megatron_lighthouse.recipe.evaluate
    FOLDER/manifest.json     packages with versions, what was left out and why, bytes, and the sha256 of both parts

The same packages give the same bytes, whatever else is installed and wherever. Imports no Megatron. Ours.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from megatron_lighthouse.usage import Parser

PACKAGES = ("megatron-core", "torch", "numpy", "psutil", "tqdm", "tensorboard", "matplotlib")
"""What this project needs (setup.py); what these need comes with them."""
SUFFIXES = {".py", ".pyi", ".pyx", ".pxd", ".rst", ".md", ".txt", ".c", ".cc", ".cpp", ".h", ".hpp", ".inl", ".cu", ".cuh"}
DOCUMENT = 256 * 1024
"""Bytes that a document holds at most, unless one file has more: four sequences of 64K tokens."""
PARTS = ("train", "held-out")
HELD_OUT = 20
"""One document in so many is held out."""
SMALLEST = 200
"""Bytes below which a file says nothing."""
LONGEST_LINE, MEAN_LINE = 1000, 100
"""Bytes; longer lines are minified code or data."""
MOST_DIGITS = 0.2
"""Share of digits above which a file is a table."""
HEAD = 4000
"""Bytes at the start of a file where its licence stands, and the remark that a program wrote it."""
GENERATED = re.compile(
    rb"@generated|auto-?generated|automatically generated|file (is|was) generated|do not (edit|modify)", re.I
)
PROSE = "python/pydoc_data/topics.py"
"""The language reference: a program wrote the file, people wrote what is in it."""
LICENCE = re.compile(rb"copyright|licen[cs]e|warrant|redistribut|all rights reserved", re.I)
LICENCE_FILES = re.compile(r"licen[cs]e|copying|copyright|notice|authors|entry_points|top_level", re.I)


@dataclass(frozen=True)
class Package:
    """An installed package and its files, in the order of their paths, each under the name that the corpus shows."""

    name: str
    version: str
    files: tuple[tuple[str, Path], ...]


@dataclass
class Filter:
    """Decides which files are text worth reading. Remembers what it has seen, so the order of files counts."""

    left_out: Counter[str] = field(default_factory=Counter)
    """Files by the reason for which they were left out."""
    seen: set[bytes] = field(default_factory=set)

    def text(self, name: str, path: Path) -> bytes | None:
        """The file's text without the licence paragraphs that came before; None for a file that is left out."""
        if LICENCE_FILES.match(PurePosixPath(name).name):
            reason = "licence or list of names"
        elif "generated" in name.lower():
            reason = "generated"
        else:
            content = path.read_bytes()
            reason = problem(content, prose=name == PROSE) or ("duplicate" if self._is_known(content) else "")
        if reason:
            self.left_out[reason] += 1
            return None
        return self._without_known_licence(content.replace(b"\r\n", b"\n"))

    def _is_known(self, content: bytes) -> bool:
        digest = hashlib.sha256(content).digest()
        known = digest in self.seen
        self.seen.add(digest)
        return known

    def _without_known_licence(self, content: bytes) -> bytes:
        """Paragraphs end at a line without a letter or digit, such as ` * ` in a comment; years do not tell them apart."""
        head = content[:HEAD]
        parts = re.split(rb"((?:^[^A-Za-z0-9\n]*\n)+)", head, flags=re.MULTILINE)  # paragraph, separator, paragraph, …
        kept = []
        for paragraph, separator in zip(parts[::2], [*parts[1::2], b""], strict=True):
            whole = paragraph.endswith(b"\n") or separator
            letters = re.sub(rb"[^a-z]", b"", paragraph.lower())
            known = whole and LICENCE.search(paragraph) and self._is_known(b"licence " + letters)
            kept += [separator] if known else [paragraph, separator]
        return b"".join(kept) + content[HEAD:]


def problem(content: bytes, prose: bool = False) -> str | None:
    """Why this is not text that a person wrote, in a word or two; None if it is. A file of `prose` may be a program's."""
    if len(content) < SMALLEST:
        return "short"
    try:
        content.decode()
    except UnicodeDecodeError:
        return "not utf-8"
    if b"\0" in content:
        return "binary"
    lines = content.splitlines()
    if max(map(len, lines)) > LONGEST_LINE or len(content) > MEAN_LINE * len(lines):
        return "long lines"
    if sum(content.count(digit) for digit in b"0123456789") > MOST_DIGITS * len(content):
        return "a table"
    if not prose and GENERATED.search(content[:HEAD]):
        return "generated"
    return None


def standard_library() -> Package:
    """Python's own library: what is not compiled, installed into it, or written for this machine."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*"):
        inside = path.relative_to(root)
        if not {"site-packages", "dist-packages"} & set(inside.parts) and not path.name.startswith("_sysconfigdata"):
            files.append((f"python/{inside.as_posix()}", path))
    return Package("python", platform.python_version(), tuple(_text_files(files)))


def installed(names: Iterable[str]) -> list[Package]:
    """These packages and what they need, as far as it is installed, in the order of their names.

    Raises:
        ValueError: one of `names` is not installed, or has no text.
    """
    names = list(names)
    missing, found, waiting = [], {}, list(names)
    while waiting:
        name = waiting.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:
            if name in names:  # what those need may be for another system
                missing.append(name)
            continue
        files = [(file.as_posix(), Path(str(package.locate_file(file)))) for file in package.files or []]
        own = [(shown, path) for shown, path in files if not shown.startswith("..") and ".dist-info/" not in shown]
        found[key] = Package(key, package.version, tuple(_text_files(own)))
        if name in names and not found[key].files:
            raise ValueError(
                f"--packages {name}: its record lists no text (is the install editable?). Install it, or leave it out."
            )
        required = [need for need in package.requires or [] if "extra ==" not in need]
        waiting += [match[0] for need in required if (match := re.match(r"[A-Za-z0-9._-]+", need))]
    if missing:
        raise ValueError(f"--packages {' '.join(missing)}: not installed. pip install {' '.join(missing)}, or name others.")
    return [found[key] for key in sorted(found)]


def _text_files(files: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    return sorted(
        (shown, path) for shown, path in files if path.suffix in SUFFIXES and path.is_file() and not path.is_symlink()
    )


def documents(package: Package, text_filter: Filter, size: int = DOCUMENT) -> Iterator[tuple[str, bytes]]:
    """The package's text as documents: files in the order of their paths, each under a line with its name.

    Files of a folder, which read and call one another, so stand in one document: what a long context is for. A document ends
    before the file with which it would be longer than `size` bytes; no file is cut.

    Yields:
        The document's name, which is its first file's, and its bytes.
    """
    parts: list[bytes] = []
    name, length = "", 0
    for shown, path in package.files:
        content = text_filter.text(shown, path)
        if content is None:
            continue
        content = b"===== %s =====\n%s\n" % (shown.encode(), content.strip(b"\n"))
        if parts and length + len(content) > size:
            yield name, b"\n".join(parts)
            parts, length = [], 0
        if not parts:
            name = shown
        parts.append(content)
        length += len(content) + 1
    if parts:
        yield name, b"\n".join(parts)


def write(packages: Sequence[Package], out: Path, size: int = DOCUMENT) -> dict[str, Any]:
    """Write the corpus of `packages` under `out`; answers the manifest.

    A document's file is named after the hash of its name: so their order, of which the entry point takes the last twentieth for
    validation, is random and fixed. The same hash says which are held out. `out` is there when all of it is.

    Raises:
        ValueError: `out` has files already.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty: name a new folder.")
    out = out.resolve()  # a link's target is what can be renamed
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{out.name}.partial-", dir=out.parent) as folder:
        whole = Path(folder) / out.name  # in it, for a temporary folder is its user's alone
        manifest = _write(packages, whole, size)
        whole.replace(out)
    return manifest


def _write(packages: Sequence[Package], out: Path, size: int) -> dict[str, Any]:
    for part in PARTS:
        (out / part).mkdir(parents=True)
    text_filter = Filter()
    contents = []
    for package in packages:
        written = Counter[str]()
        for name, document in documents(package, text_filter, size):
            digest = hashlib.sha256(name.encode()).hexdigest()
            part = PARTS[int(digest[:8], 16) % HELD_OUT == 0]
            (out / part / f"{digest[:12]}-{package.name}.txt").write_bytes(document)
            written.update(documents=1, bytes=len(document))
        contents.append({"name": package.name, "version": package.version, **written})
    manifest = {
        "packages": [entry for entry in contents if "bytes" in entry],
        "files left out": dict(sorted(text_filter.left_out.items())),
        **{part: _summary(out / part) for part in PARTS},
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _summary(folder: Path) -> dict[str, Any]:
    """Of the files put end to end in the order of their names."""
    key, files, total = hashlib.sha256(), sorted(folder.glob("*.txt")), 0
    for file in files:
        content = file.read_bytes()
        key.update(content)
        total += len(content)
    return {"documents": len(files), "bytes": total, "sha256": key.hexdigest()}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the corpus; 1 if it is smaller than asked for."""
    parser = Parser(prog="python -m megatron_lighthouse.recipe.corpus", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--packages",
        nargs="*",
        default=PACKAGES,
        metavar="NAME",
        help="installed packages whose text is taken, and that of what they need, besides Python's library "
        f"(default: what this project needs: {' '.join(PACKAGES)})",
    )
    parser.add_argument("--megabytes", type=float, default=100, help="least size of the corpus in MB (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        manifest = write([standard_library(), *installed(options.packages)], options.out)
    except ValueError as error:
        parser.error(str(error))
    for entry in sorted(manifest["packages"], key=lambda entry: -entry["bytes"]):
        print(f"{entry['bytes'] / 1e6:8.2f} MB in {entry['documents']:4d} documents: {entry['name']} {entry['version']}")
    print("files left out:", ", ".join(f"{count} {reason}" for reason, count in manifest["files left out"].items()))
    for part in PARTS:
        print(f"{options.out / part}: {manifest[part]['bytes'] / 1e6:.2f} MB in {manifest[part]['documents']} documents")
    total = (manifest["train"]["bytes"] + manifest["held-out"]["bytes"]) / 1e6
    if total < options.megabytes:
        print(
            f"--megabytes {options.megabytes:g}: there are {total:.1f}. Install packages with much text and name them too: "
            f"--packages {' '.join(options.packages)} scipy pandas scikit-learn django sphinx",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
