"""`--use-checkpoint-args`: a refusal says which of the options that it names the checkpoint decides."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_lighthouse.mcore.command_line.from_checkpoint import explained, forced
from tests.mcore.harness import refused, run


@pytest.fixture
def args(megatron: None, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Of a run that takes its model from a checkpoint with these arguments, once Megatron has taken them."""
    from megatron.training import checkpointing
    from megatron.training.arguments import add_megatron_arguments

    stored = Namespace(attention_dropout=0.1, num_query_groups=2, num_layers=4, position_embedding_type="rope", spec=["a", "b"])
    state = {"args": stored, "iteration": 3, "checkpoint_version": 3.0}
    monkeypatch.setattr(checkpointing, "_load_base_checkpoint", lambda *_, **__: (state, "", False, None))
    words = "--use-checkpoint-args --load there --attention-dropout 0 --num-query-groups 1"
    taken = add_megatron_arguments(ArgumentParser(allow_abbrev=False)).parse_args(words.split())
    checkpointing.load_args_from_checkpoint(taken)
    return taken


def told(args: Namespace, message: str) -> list[str]:
    """What is added to a refusal."""
    with pytest.raises(ValueError, match=r"^--") as error, explained(args, lambda parser: parser):
        raise ValueError(message)
    lines = str(error.value).split("\n")
    assert lines[0] == message
    return lines[1:]


def test_only_what_the_command_line_cannot_change_is_forced(args: Namespace) -> None:
    found = forced(args)
    assert {"attention_dropout", "num_query_groups", "spec"} <= found
    assert not found & {"num_layers", "hidden_size", "seq_length", "micro_batch_size"}
    args.use_checkpoint_args = False
    assert forced(args) == set()


def test_a_refusal_says_what_is_the_checkpoints(args: Namespace) -> None:
    (line,) = told(args, "--attention-dropout 0.1 would drop: use --attention-dropout 0.")
    assert line.startswith("--attention-dropout is the checkpoint's (0.1), which --use-checkpoint-args takes whatever")
    assert "leave --use-checkpoint-args out and give all arguments of the model" in line
    assert told(args, "--attention lighthouse chooses the spec, and so does --spec: leave one out.")[0].startswith("--spec is")
    assert len(told(args, "--attention-dropout 0.1: no.\n  - (--num-query-groups 2): no.".replace("\n", ";"))) == 2


def test_nothing_is_added_where_the_command_line_decides(args: Namespace) -> None:
    assert told(args, "--num-layers 4 and --attention-dropouts: no.") == []
    args.use_checkpoint_args = False
    assert told(args, "--attention-dropout 0.1: no.") == []


def test_a_run_is_told_before_anything_starts(tmp_path: Path) -> None:
    checkpoints = str(tmp_path / "checkpoints")
    asked: list[Any] = ["--attention-dropout", "0.1", "--train-iters", "1", "--save", checkpoints, "--save-interval", "1"]
    run(tmp_path / "dense", *asked)
    words = ["--attention", "lighthouse", "--attention-dropout", "0", "--load", checkpoints, "--use-checkpoint-args"]
    log = refused(tmp_path / "lighthouse", *words, "--override-opt-param-scheduler")
    assert "--attention-dropout is the checkpoint's (0.1)" in log
    assert "leave --use-checkpoint-args out" in log
