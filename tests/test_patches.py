"""patches/patch.py on checkouts made from the patch's own context; tried on the real ones by hand (docs/upstream.md)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PATCHES = Path(__file__).parents[1] / "patches"


def upstream_lines() -> list[str]:
    """The lines of pretrain_gpt.py that the patch knows, as upstream has them."""
    patch = (PATCHES / "pretrain_gpt.patch").read_text().splitlines()
    return [line[1:] for line in patch if line.startswith((" ", "-")) and not line.startswith("---")]


def checkout(folder: Path, version: str = "0.19", file: str | None = None) -> Path:
    """A Megatron-LM checkout as far as the patch can see."""
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    major, minor = version.split(".")
    (core / "package_info.py").write_text(f"MAJOR = {major}\nMINOR = {minor}\nPATCH = 1\n")
    lines = upstream_lines()
    spread = [*lines[:2], *["# other lines"] * 40, *lines[2:5], "# and others", *lines[5:]]
    (folder / "pretrain_gpt.py").write_text("\n".join(spread) + "\n" if file is None else file)
    return folder


def patch(action: str, folder: Path, *before: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, str(PATCHES / "patch.py"), action, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """What it was refused with, in one message that names the way without a patch."""
    assert result.returncode == 1
    assert result.stderr.startswith("refused: ")
    assert "Traceback" not in result.stderr
    assert "megatron_lighthouse.pretrain_gpt" in result.stderr
    return result.stderr


@pytest.mark.parametrize("version", ["0.19", "0.20"])
def test_apply_check_revert(version: str, tmp_path: Path) -> None:
    file = checkout(tmp_path, version) / "pretrain_gpt.py"
    before = file.read_bytes()
    assert "as upstream has it" in patch("check", tmp_path).stdout
    for _ in range(2):
        assert patch("apply", tmp_path).returncode == 0
        assert "takes --attention lighthouse" in patch("check", tmp_path).stdout
    after = file.read_text()
    assert "extra_args_provider=with_lighthouse_arguments(add_modelopt_args" in after
    assert "pretrain_cfg_container_from_args(args, use_attention(args, model_cfg))" in after
    assert len(after.splitlines()) == len(before.splitlines()) + 1
    for _ in range(2):
        assert patch("revert", tmp_path).returncode == 0
        assert file.read_bytes() == before


def test_inside_another_repository(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    folder = checkout(tmp_path / "third_party" / "Megatron-LM")
    assert patch("apply", folder).returncode == 0
    assert "use_attention" in (folder / "pretrain_gpt.py").read_text()


@pytest.mark.parametrize(
    ("version", "file", "message"),
    [
        ("0.18", None, "is Megatron-core 0.18; the patch was tried with 0.19 and 0.20"),
        ("0.21", None, "is Megatron-core 0.21"),
        ("0.19", "print('rewritten')\n", "differs from upstream's where the patch goes"),
    ],
)
def test_what_it_was_not_tried_on_is_refused(version: str, file: str | None, message: str, tmp_path: Path) -> None:
    before = (checkout(tmp_path, version, file) / "pretrain_gpt.py").read_bytes()
    for action in ("apply", "check", "revert"):
        result = patch(action, tmp_path)
        assert result.returncode == 1
        assert message in result.stderr
        assert "megatron_lighthouse.pretrain_gpt" in result.stderr
    assert (tmp_path / "pretrain_gpt.py").read_bytes() == before


def test_a_folder_that_is_no_checkout(tmp_path: Path) -> None:
    result = patch("apply", tmp_path)
    assert result.returncode == 1
    assert "is not a Megatron-LM checkout" in result.stderr


AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.mark.skipif(AS_ROOT and not shutil.which("setpriv"), reason="root writes everywhere, and setpriv is not here")
def test_a_folder_that_cannot_be_written_is_refused_with_gits_reason(tmp_path: Path) -> None:
    file = checkout(tmp_path / "read-only") / "pretrain_gpt.py"
    before = file.read_bytes()
    file.parent.chmod(0o555)
    try:
        # without this capability root is held to the mode bits too
        result = patch("apply", file.parent, *(["setpriv", "--bounding-set=-dac_override"] if AS_ROOT else []))
    finally:
        file.parent.chmod(0o755)
    said = refusal(result)
    assert "Permission denied" in said
    assert f"make {file.parent} writable" in said
    assert file.read_bytes() == before


def test_without_git_it_says_so(tmp_path: Path) -> None:
    checkout(tmp_path / "checkout")
    for action in ("apply", "check", "revert"):
        assert "git is needed, and is not on PATH" in refusal(patch(action, tmp_path / "checkout", PATH=str(tmp_path)))


@pytest.mark.parametrize("mode", [0o444, 0o600, 0o664, 0o755], ids=oct)
def test_the_mode_is_kept(mode: int, tmp_path: Path) -> None:
    file = checkout(tmp_path) / "pretrain_gpt.py"
    file.chmod(mode)
    for action in ("apply", "revert"):
        before = file.read_bytes()
        assert patch(action, tmp_path).returncode == 0
        assert file.read_bytes() != before
        assert file.stat().st_mode & 0o7777 == mode


@pytest.mark.parametrize("applied", [False, True], ids=["upstream's", "patched"])
def test_crlf_line_ends_are_named(applied: bool, tmp_path: Path) -> None:
    file = checkout(tmp_path) / "pretrain_gpt.py"
    if applied:
        patch("apply", tmp_path)
    lines = file.read_bytes()
    file.write_bytes(lines.replace(b"\n", b"\r\n"))
    for action in ("apply", "check", "revert"):
        assert "has CRLF line ends where the patch has LF: convert it (sed -i 's/\\r$//'" in refusal(patch(action, tmp_path))
    file.write_bytes(lines)
    assert patch("check", tmp_path).returncode == 0


def test_a_crlf_elsewhere_is_not_named_where_the_lines_differ(tmp_path: Path) -> None:
    checkout(tmp_path, file="print('rewritten')\r\n")
    assert "differs from upstream's" in refusal(patch("apply", tmp_path))


def test_a_symbolic_link_is_named(tmp_path: Path) -> None:
    file = checkout(tmp_path) / "pretrain_gpt.py"
    file.rename(tmp_path / "elsewhere.py")
    file.symlink_to("elsewhere.py")
    for action in ("apply", "check", "revert"):
        assert "is a symbolic link to elsewhere.py" in refusal(patch(action, tmp_path))
    assert file.is_symlink()


@pytest.mark.parametrize("reverted", range(3))
def test_a_patch_that_is_partly_in_is_named(reverted: int, tmp_path: Path) -> None:
    file = checkout(tmp_path) / "pretrain_gpt.py"
    upstream = upstream_lines()
    patch("apply", tmp_path)
    names = ["megatron_lighthouse.mcore", "with_lighthouse_arguments(", "use_attention(args"]
    old = [None, *(next(x for x in upstream if mark in x) for mark in ("extra_args_provider=", "full_config = "))][reverted]
    kept = [old if names[reverted] in x else x for x in file.read_text().splitlines()]
    file.write_text("\n".join(x for x in kept if x is not None) + "\n")
    for action in ("apply", "check", "revert"):
        assert "is partly patched (2 of the 3 new lines are in it): restore upstream's file" in refusal(patch(action, tmp_path))


@pytest.mark.parametrize("file", ["patches/pretrain_gpt.patch", "docs/upstream.md"])
def test_what_users_are_told_to_import_is_there(file: str) -> None:
    lines = (PATCHES.parent / file).read_text().splitlines()
    imports = [line.removeprefix("+") for line in lines if line.removeprefix("+").startswith("from megatron_lighthouse")]
    assert imports
    for line in imports:
        exec(line)
