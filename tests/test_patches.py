"""patches/patch.py on checkouts made from the patch's own context; tried on the real ones by hand (docs/upstream.md)."""

from __future__ import annotations

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


def patch(action: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PATCHES / "patch.py"), action, str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


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
