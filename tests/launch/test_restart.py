"""What the check says of a run that is started again: options that would undo that it goes on, and another learning rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_lighthouse.launch import check, restart
from tests.launch.test_submit import words

FOLDER = "--save {0} --load {0}"


def asked(folder: Path, more: str) -> str:
    given = [*words("530m-98k"), *FOLDER.format(folder).split(), *more.split()]
    args = check.parse(given)
    return "\n".join(restart.problems(args, Path(args.load)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", ""),
        ("--finetune", "--finetune would begin at iteration 0 at every start"),
        ("--no-load-optim", "leave it out (--pretrained-checkpoint FOLDER loads weights alone, once)"),
        ("--no-save-optim", "leaves a requeued job nothing to go on from"),
        ("--ckpt-step 70", "write 70 into latest_checkpointed_iteration.txt"),
        ("--override-ckpt-iteration 70", "--override-ckpt-iteration 70 would go back there at every start"),
        ("--finetune --load elsewhere", ""),
        ("--ckpt-step 70 --skip-train", ""),  # an evaluation
        ("--pretrained-checkpoint elsewhere", ""),
    ],
)
def test_a_run_that_would_not_go_on(more: str, message: str, tmp_path: Path) -> None:
    found = asked(tmp_path, more)
    assert (message in found) if message else not found


def test_another_learning_rate_than_the_checkpoints(tmp_path: Path) -> None:
    """Read where there is no Megatron, from what the run saved."""
    recipe = check.parse(words("530m-98k"))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    (tmp_path / "iter_0000010").mkdir()
    saved = {"args": None, "opt_param_scheduler": {"max_lr": recipe.lr, "min_lr": recipe.min_lr}}
    torch.save(saved, tmp_path / "iter_0000010" / "common.pt")
    assert asked(tmp_path, "") == ""
    assert f"--lr (0.5, was {recipe.lr})" in asked(tmp_path, "--lr 0.5")
    assert asked(tmp_path, "--lr 0.5 --override-opt-param-scheduler") == ""
    words_of_the_check = ["--nodes", "1", "--gpus-per-node", "8", "--", *words("530m-98k"), "--mock-data", "--lr", "0.5"]
    assert check.main(words_of_the_check) == 0
    assert check.main([*words_of_the_check, "--load", str(tmp_path)]) == 1
