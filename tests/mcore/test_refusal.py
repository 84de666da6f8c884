"""Which errors end a run with status 2, after which a job is not queued again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_lighthouse.mcore import refusal
from megatron_lighthouse.mcore.refusal import REFUSED, RefusedError, repeats
from tests.mcore.harness import MODEL, TEXT, Processes

PARSED = {
    "rule": ValueError("--flag 1 must be 2"),
    "Megatron's rule": AssertionError(),
    "an attribute that is not there": AttributeError("x"),
    "a key": KeyError("x"),
    "a package": ModuleNotFoundError("x"),
    "raised by a tokenizer": RuntimeError("Internal: could not parse ModelProto"),
    "another tokenizer": Exception("expected value at line 1"),
    "no file": FileNotFoundError(2, "No such file"),
    "no right": PermissionError(13, "Permission denied"),
    "read-only": OSError(30, "Read-only file system"),
}
MAY_PASS = {
    "half a file": json.JSONDecodeError("half a file", "{", 1),
    "half a character": UnicodeDecodeError("utf-8", b"", 0, 1, "x"),
    "a disk": OSError(5, "Input/output error"),
    "a stale handle": OSError(116, "Stale file handle"),
    "a network": ConnectionResetError(104, "x"),
    "a hub that does not answer": OSError("We couldn't connect"),
    "memory": MemoryError(),
    "a GPU": torch.AcceleratorError("CUDA error"),
}


@pytest.mark.parametrize("name", [*PARSED, *MAY_PASS])
def test_what_may_pass_is_no_refusal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While arguments are parsed."""
    from megatron_lighthouse.mcore.loop import pretrain

    error = (PARSED | MAY_PASS)[name]
    monkeypatch.setattr(pretrain.before, "given", lambda words: None)
    monkeypatch.setattr(pretrain.hooks, "adapt_machine", lambda: None)
    monkeypatch.setattr(pretrain, "parse_and_validate_args", mock.Mock(side_effect=error))
    with pytest.raises(SystemExit if name in PARSED else type(error)) as ended:
        pretrain.run()
    assert name in MAY_PASS or getattr(ended.value, "code", None) == REFUSED


def raised(function: Callable[[], object]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("it did not raise")


def test_a_rule_of_megatrons_is_told_from_what_torch_meets() -> None:
    """Once arguments are parsed: by the code that raised it."""
    from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split

    rule = raised(lambda: parse_and_normalize_split("1,2,3,4"))
    assert repeats(rule, parsed=True)
    torchs = raised(lambda: torch.load("/nowhere"))
    assert not repeats(torchs, parsed=True)
    assert not repeats(raised(lambda: torch.nn.Linear(2, 2)(torch.ones(3))), parsed=False)
    assert not repeats(RuntimeError("NCCL timed out"), parsed=True)
    assert repeats(RefusedError("x"), parsed=True)
    megatrons = Exception("Failed to write dataset materials")
    for number, lasting in ((30, True), (28, False)):  # a file system that is read-only, or full
        megatrons.__cause__ = OSError(number, "x")
        assert repeats(megatrons, parsed=True) == lasting


def test_a_run_that_megatron_refuses_late(tmp_path: Path) -> None:
    """Once the model is built, when it meets the data or a checkpoint."""
    checkpoint = ["--save", str(tmp_path / "saved"), "--load", str(tmp_path / "saved"), "--save-interval", "1", *TEXT]
    ended = {}
    for name, more in {
        "data": [*TEXT, "--dataloader-fast-cache-load"],
        "first": [*checkpoint, "--exit-interval", "1"],
        "checkpoint": [*checkpoint, "--num-layers", "5"],
    }.items():
        processes = Processes(tmp_path / name, 1, [*MODEL, *more])
        ended[name] = processes.wait(), processes.log.read_text()
    assert {name: statuses for name, (statuses, _) in ended.items()} == {"data": [2], "first": [0], "checkpoint": [2]}
    assert "the datasets cannot be built: AssertionError: --data-cache-path must be provided" in ended["data"][1]
    assert "Global shape mismatch for loaded" in ended["checkpoint"][1]


def test_the_run_says_all_of_it_once(tmp_path: Path) -> None:
    """On two ranks, one of which speaks; what they cannot share out hides nothing else."""
    wrong = "--context-parallel-size 3 --lr abc --lighthouse-bugdet 8 --attention-dropout 0.1 --clip-grad -1 --rotary-base 5e5"
    processes = Processes(tmp_path / "run", 2, [*MODEL, "--attention", "lighthouse", *TEXT, *wrong.split()])
    statuses = processes.wait()
    log = processes.log.read_text()
    assert statuses[0] == REFUSED, log
    for says in (
        "--context-parallel-size 3 x --pipeline-model-parallel-size 1 = 3 must divide --nproc-per-node 2: use",
        "--lr abc must be a number",
        "did you mean --lighthouse-budget?",
        "--attention-dropout 0.1",
        "--clip-grad -1.0 must be at least 0",
        "--rotary-base 5e5 must be a whole number, in digits alone: write 500000.",
    ):
        assert log.count(says) == 1, (says, log)
    assert (log.count("The run cannot start as asked:"), "Traceback" in log) == (1, False), log


@pytest.mark.parametrize(
    ("rank", "error", "says"),
    [
        ("0", ValueError("one\ntwo"), r"The run cannot start as asked:\n  - one\n  - two\n"),
        ("0", KeyError("x"), r"(?s).*KeyError: 'x'.*The run cannot start as asked: 'x'\n"),
        ("3", ValueError("one\ntwo"), r"rank 3 on \S+: refused: one \(and 1 more\)\n"),
    ],
)
def test_how_a_refusal_is_said(
    rank: str, error: Exception, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(refusal, "WAIT", 0)
    monkeypatch.setattr(refusal, "_raised_in", lambda error, *packages: isinstance(error, ValueError))
    refusal.say(error)
    assert re.fullmatch(says, said := capsys.readouterr().err), said
