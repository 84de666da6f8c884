"""Recipes and cluster files as any editor writes them: scripts and plan read the same words, or refuse the same line."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_lighthouse.plan.words import recipe_words
from tests.launch.test_submit import LAUNCH

RECIPE = "# a model\n--num-layers 2  --bf16 # half\n\n\t--seq-length\t128 \n--data-path /data/Größe/x\n--swiglu"
WORDS = ["--num-layers", "2", "--bf16", "--seq-length", "128", "--data-path", "/data/Größe/x", "--swiglu"]
CLUSTER = "NODES=2\n# of two GPUs\nGPUS_PER_NODE=4 # each\nARCH=cpu\nNCCL_DEBUG=INFO"


def bash(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-euc", f'source "{LAUNCH}/common.sh"; {script}', "bash", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def as_others_write(text: str) -> dict[str, bytes]:
    dos, mark = text.replace("\n", "\r\n"), "\ufeff"
    return {
        "plain": text.encode(),
        "last line ended": f"{text}\n".encode(),
        "DOS": dos.encode(),
        "DOS, last line ended": f"{dos}\r\n".encode(),
        "DOS, last line half ended": f"{dos}\r".encode(),
        "mark": f"{mark}{text}".encode(),
        "mark and DOS": f"{mark}{dos}\r\n".encode(),
        "trailing blanks": text.replace("\n", " \t \r\n").encode(),
    }


@pytest.mark.parametrize("how", as_others_write(RECIPE))
def test_a_recipe(how: str, tmp_path: Path) -> None:
    file = tmp_path / "own.args"
    file.write_bytes(as_others_write(RECIPE)[how])
    assert recipe_words(file) == WORDS
    done = bash('read_recipe "$1"; printf "%s\\n" "${RECIPE_ARGUMENTS[@]}"', str(file))
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, WORDS, "")


@pytest.mark.parametrize("how", as_others_write(CLUSTER))
def test_a_cluster_file(how: str, tmp_path: Path) -> None:
    file = tmp_path / "own.env"
    file.write_bytes(as_others_write(CLUSTER)[how])
    done = bash('read_cluster "$1"; check_cluster; printf "%s|" "$NODES" "$GPUS_PER_NODE" "$ARCH" "$NCCL_DEBUG"', str(file))
    assert (done.returncode, done.stdout, done.stderr) == (0, "2|4|cpu|INFO|", "")


ODD = {
    "a no-break space": "--num-layers\xa02".encode(),
    "a carriage return within": b"--num-layers 2\r--bf16",
    "an escape": b"--num-layers \x1b[0m2",
    "a form feed": b"--num-layers\x0c2",
}


@pytest.mark.parametrize("what", ODD)
def test_characters_that_no_word_has(what: str, tmp_path: Path) -> None:
    file = tmp_path / "own.args"
    file.write_bytes(b"# a comment\xc2\xa0may\n--swiglu\n" + ODD[what] + b"\n")
    with pytest.raises(ValueError, match=f"{file}, line 3: .* plain blanks"):
        recipe_words(file)
    done = bash('read_recipe "$1"', str(file))
    assert done.returncode == 2
    assert f"{file}, line 3: " in done.stderr


def test_another_encoding(tmp_path: Path) -> None:
    file = tmp_path / "own.args"
    file.write_bytes(RECIPE.encode("utf-16"))
    with pytest.raises(ValueError, match="cannot be read"):
        recipe_words(file)
    done = bash('read_recipe "$1"', str(file))
    assert done.returncode == 2
    assert f"{file}, line 1: " in done.stderr
