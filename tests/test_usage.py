"""How programs begin and what they say of a wrong command line: quickly, in one line, without what libraries have to say."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import warnings
from argparse import Action
from pathlib import Path

import pytest

from megatron_lighthouse import bars
from megatron_lighthouse.plan.words import recipe_words
from megatron_lighthouse.quiet import quiet_imports
from megatron_lighthouse.usage import Parser, once, unknown_flag, with_nearest

ROOT = Path(__file__).parents[1]
OURS = "python -m megatron_lighthouse."
SLOW = {"torch", "megatron", "matplotlib"}
ASKED = """
import runpy, sys
sys.argv = ["x", "{flag}"]
try:
    runpy.run_module("{module}", run_name="__main__")
except SystemExit as end:
    print(end.code, *sorted({slow} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        *(("launch.check", flag) for flag in ("--help", "--not-a-flag=1")),
        *(("mcore.data.prepare", flag) for flag in ("--help", "--not-a-flag=1")),
        ("recipe.two_stage", "--help"),  # what it does not know is Megatron's, which says so
    ],
)
def test_help_and_a_wrong_flag_wait_for_no_library(module: str, flag: str) -> None:
    text = ASKED.format(flag=flag, module=f"megatron_lighthouse.{module}", slow=SLOW)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    *said, ended = done.stderr.splitlines()
    assert ended == ("0" if flag == "--help" else "2")
    assert len(said) == (0 if flag == "--help" else 1), said
    assert "usage: " in done.stdout if flag == "--help" else "usage: " not in done.stderr


COMMANDS = """
import contextlib, io, os, runpy, sys
for line in {lines}:
    module, *sys.argv[1:] = line.split()
    sys.argv[0], said, status = "x", io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_module("megatron_lighthouse." + module, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    ours = [name for name in sys.modules if name.startswith("megatron_lighthouse.")]
    torch = {slow} & set(sys.modules)
    print(status, *(["imports", *torch, "by", ours[-1]] if torch else []), said.getvalue().splitlines()[:1])
"""


def test_what_asks_torch_for_nothing_imports_none() -> None:
    """The plan, the check before a job is queued (as far as it asks no Megatron), and every other command's --help."""
    run = "--nodes 1 --gpus-per-node 8 --arch blackwell --without-megatron --"
    recipe = " ".join(recipe_words(ROOT / "launch/recipes/llama3-8b-128k.args")) + ""
    recipe += " --mock-data --tokenizer-type NullTokenizer --vocab-size 128256 --save x --load x"
    said = {
        "plan --list": "model",
        "plan --model llama3-8b --tokens 20B --seq-length 512K --gpus 8 --details": "20B tokens of llama3-8b",
        "plan --recipe 530m-1m --lighthouse-scorer gla --gpus 32": "10B tokens of 530m-1m",
        f"launch.check {run} {recipe}": "8 ranks = TP 2",
        **{f"{name} --help": "usage" for name in ("plan", "plan scaling", "profiling", "convert", "recipe.corpus")},
        **{f"{name} --help": "usage" for name in ("recipe.recovery", "recipe.evaluate")},
    }
    wrong = {
        f"launch.check {run} {recipe} --lightouse-budget 2": (1, "The run cannot start as asked:"),
        "plan --seq-lenght 4K": (
            2,
            f"{OURS}plan: --seq-lenght is not a known flag: did you mean --seq-length?",
        ),
        "plan llama3-8b": (2, f"{OURS}plan: llama3-8b follows no flag that takes it."),
        "profiling report --cvs x": (
            2,
            f"{OURS}profiling: --cvs is not a known flag: did you mean --csv?",
        ),
        "convert": (2, f"{OURS}convert: the following arguments are required: {{hf-to-megatron,"),
    }
    text = COMMANDS.format(lines=[*said, *wrong], slow=SLOW)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    expected = {command: (0, begins) for command, begins in said.items()} | wrong
    for line, (command, (status, begins)) in zip(done.stdout.splitlines(), expected.items(), strict=True):
        assert line.startswith(f"{status} [{begins!r}"[:-1]), (command, line)


def flags(names: str) -> dict[str, Action]:
    """As a parser knows them."""
    parser = Parser(add_help=False)
    for name in names.split():
        parser.add_argument(name)
    return parser._option_string_actions


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parser = Parser(prog="program")
    parser.add_argument("--steps", type=int, choices=(1, 2))
    for words, says in (
        (["--step", "1"], "program: --step is not a known flag: did you mean --steps? See --help.\n"),
        (["--steps", "x"], "program: --steps x must be a whole number, in digits alone: give one. See --help.\n"),
        (["word"], "program: word follows no flag that takes it. See --help.\n"),
    ):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(words)
        assert (ended.value.code, capsys.readouterr().err) == (2, says)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        parser.parse_args(["word"])
    assert capsys.readouterr().err == ""
    assert with_nearest("unrecognized arguments: --b --ab", flags("--abc")).count("is not a known flag") == 2
    stray = "-- among the arguments hides all flags behind it: leave it out."
    assert with_nearest("unrecognized arguments: -- --abc 1", flags("--abc")) == stray


def test_imports_say_nothing_and_what_follows_does(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with quiet_imports():
            warnings.warn("a library's", stacklevel=1)
            logging.getLogger("library").warning("a library's")
            logging.getLogger("library").error("an error")
        warnings.warn("ours", stacklevel=1)
        logging.getLogger("ours").warning("ours too")
    assert [str(warning.message) for warning in shown] == ["ours"]
    assert [record.message for record in caplog.records] == ["an error", "ours too"]


def test_a_bar_without_a_terminal_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(bars.sys, "stderr", stream)
    for _ in bars.bar(range(1000), desc="evaluation"):
        pass
    written = stream.getvalue()
    assert "\r" not in written
    lines = written.splitlines()
    assert len(lines) <= 3
    assert lines[-1].startswith("evaluation: 100%")
    assert written.endswith("\n")


def test_what_is_drawn_again_is_no_line_of_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars.sys, "stderr", stream := io.StringIO())
    lines = bars.Lines()
    for drawn in (
        "\rx:  39%|# | 311/800 [00:10<00:15]",
        "\rx:  39%|# | 311/800 [00:28<00:15]",
        "\rx: 100%|##| 800/800 [00:49]",
    ):
        lines.write(drawn)
    assert stream.getvalue() == "x:  39%|# | 311/800 [00:10<00:15]\nx: 100%|##| 800/800 [00:49]\n"


def test_a_flag_cut_short_is_taken_for_its_beginning() -> None:
    known = flags("--data-path --fim-data --run-folder --lr-warmup-iters --warmup-iters")
    pairs = ("--data --data-path", "--lr-warmup-iter --lr-warmup-iters", "--fim-dat --fim-data", "--run --run-folder")
    for word, meant in map(str.split, pairs):
        assert unknown_flag(word, known) == f"{word} is not a known flag: did you mean {meant}?"


def test_what_is_said_of_several_is_said_once() -> None:
    assert once([("", "wrong"), ("", "bad")]) == ["wrong", "bad"]
    assert once([("a", "wrong"), ("b", "bad"), ("c", "wrong")]) == ["a, c: wrong", "b: bad"]
    assert once((name, "wrong") for name in "abcde") == ["a, b, c and 2 more: wrong"]
