"""`python patches/patch.py {apply,check,revert} MEGATRON_LM`: `--attention lighthouse` for an upstream Megatron-LM checkout.

Changes three lines of its pretrain_gpt.py, or none: a version that was not tried, or a file that differs, is refused.
"""

from __future__ import annotations

import argparse
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

PATCH = Path(__file__).with_name("pretrain_gpt.patch").resolve()
TRIED = ("0.19", "0.20")
"""Versions of Megatron-core: branch core_r0.19.0, and main while it names itself 0.20."""
ELSEWHERE = "train with `python -m megatron_lighthouse.pretrain_gpt`, which needs no patch"


class Refused(Exception):
    """The patch cannot go into this checkout, or out of it."""


def version_of(checkout: Path) -> str:
    """Megatron-core's version in `checkout`, as "major.minor". Raises Refused where there is none."""
    file = checkout / "megatron" / "core" / "package_info.py"
    if not file.is_file() or not (checkout / "pretrain_gpt.py").is_file():
        raise Refused(f"{checkout} is not a Megatron-LM checkout: it needs pretrain_gpt.py and {file.relative_to(checkout)}.")
    numbers = dict(re.findall(r"^(MAJOR|MINOR) = (\d+)", file.read_text(), re.MULTILINE))
    if len(numbers) < 2:
        raise Refused(f"{file} does not name a version (MAJOR and MINOR).")
    return f"{numbers['MAJOR']}.{numbers['MINOR']}"


def fits(checkout: Path, *options: str) -> bool:
    """Whether `git apply` with `options` would change `checkout`."""
    return not _git_apply(checkout, "--check", *options).returncode


def is_applied(checkout: Path) -> bool:
    """Whether the patch is in. Raises Refused for an unknown version, or a file that fits neither way."""
    version = version_of(checkout)
    if version not in TRIED:
        raise Refused(
            f"{checkout} is Megatron-core {version}; the patch was tried with {' and '.join(TRIED)}. "
            f"Check out core_r0.19.0 or a newer release of this patch, or {ELSEWHERE}."
        )
    if fits(checkout, "--reverse"):
        return True
    if fits(checkout):
        return False
    raise Refused(f"pretrain_gpt.py in {checkout} {_misfit(checkout)}, or {ELSEWHERE}.")


def _misfit(checkout: Path) -> str:
    """Why the patch fits neither way, and what to do."""
    file = checkout / "pretrain_gpt.py"
    if file.is_symlink():
        return f"is a symbolic link to {os.readlink(file)}, which git does not patch: put a copy of that file in its place"
    text = file.read_bytes()
    if b"\r\n" in text and (fits(checkout, "--ignore-whitespace") or fits(checkout, "--reverse", "--ignore-whitespace")):
        return "has CRLF line ends where the patch has LF: convert it (sed -i 's/\\r$//' pretrain_gpt.py)"
    added = [line[1:] for line in PATCH.read_bytes().splitlines() if line.startswith(b"+") and not line.startswith(b"+++")]
    found = sum(line in text for line in added)
    if 0 < found < len(added):
        return f"is partly patched ({found} of the {len(added)} new lines are in it): restore upstream's file"
    reason = _git_apply(checkout, "--check").stderr.strip()
    return f"differs from upstream's where the patch goes ({reason}): restore upstream's file"


def change(checkout: Path, *options: str) -> None:
    """Apply the patch, or revert it by "--reverse". Raises Refused where git cannot write."""
    file = checkout / "pretrain_gpt.py"
    mode = stat.S_IMODE(file.stat().st_mode)
    result = _git_apply(checkout, *options)
    if result.returncode:
        raise Refused(f"git could not write {file} ({result.stderr.strip()}): make {checkout} writable, or {ELSEWHERE}.")
    file.chmod(mode)  # git writes a new file, with the mode that the umask gives


def _git_apply(checkout: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # outside any repository's view, so that an enclosing one does not change what the paths mean
    environment = {**os.environ, "GIT_DIR": os.devnull, "LC_ALL": "C"}
    command = ["git", "apply", *options, str(PATCH)]
    try:
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Refused(f"git is needed, and is not on PATH: install it, or {ELSEWHERE}.") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python patches/patch.py", description=__doc__)
    parser.add_argument("action", choices=["apply", "check", "revert"])
    parser.add_argument("checkout", type=Path, metavar="MEGATRON_LM", help="the checkout's folder")
    options = parser.parse_args(argv)
    checkout: Path = options.checkout
    try:
        applied = is_applied(checkout)
        wanted = {"apply": True, "revert": False}.get(options.action, applied)
        if wanted != applied:
            change(checkout, *([] if wanted else ["--reverse"]))
    except (Refused, PermissionError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    state = "takes --attention lighthouse" if wanted else "is as upstream has it"
    print(f"{checkout / 'pretrain_gpt.py'} {state}{'' if wanted != applied else ' (unchanged)'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
