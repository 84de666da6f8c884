"""A run that goes on with another learning rate: refused without the flag that says which, else with the moments it had."""

from __future__ import annotations

import pickle
import shutil
from argparse import Namespace
from collections import Counter, defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as read
from torch.distributed.checkpoint.metadata import TensorProperties

from megatron_lighthouse.launch import check
from megatron_lighthouse.mcore.command_line import resume, stored
from megatron_lighthouse.mcore.loop import unsaved
from tests.mcore.harness import refused, run
from tests.tolerances import assert_close

SAVED, NEW = 5e-3, 1e-3
"""Learning rates: of the two iterations in the checkpoint, and of those after it."""
STEPS = ["--attention", "lighthouse", "--train-iters", "4", "--clip-grad", "0"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    save = ["--save", str(folder / "checkpoint"), "--save-interval", "2", "--exit-interval", "2"]
    run(folder, *STEPS, *save)
    return folder / "checkpoint"


def tensors(checkpoint: Path, iteration: int) -> dict[str, torch.Tensor]:
    """All weights and moments, in float64."""
    folder = checkpoint / f"iter_{iteration:07}"
    known = FileSystemReader(folder).read_metadata().state_dict_metadata
    found: dict[str, Any] = {name: torch.empty(of.size) for name, of in known.items() if hasattr(of, "size")}
    read(found, checkpoint_id=folder, no_dist=True)
    return {name: tensor.double() for name, tensor in found.items()}


@pytest.mark.parametrize(
    ("flag", "words", "rate"),
    [
        (resume.OVERRIDE, ["--lr", str(NEW), "--min-lr", str(NEW / 2)], NEW),
        (resume.KEEP, ["--lr", str(NEW)], SAVED),
    ],
    ids=["the run's rate", "the checkpoint's rate"],
)
def test_the_moments_go_on(flag: str, words: list[str], rate: float, checkpoint: Path, tmp_path: Path) -> None:
    """The third step is that of AdamW (Loshchilov and Hutter, 2019) on the moments of the checkpoint, in float64."""
    save = ["--save", str(tmp_path / "after"), "--save-interval", "1", "--exit-interval", "3"]
    run(tmp_path, *STEPS, "--load", str(checkpoint), *save, flag, *words)
    before, after = tensors(checkpoint, 2), tensors(tmp_path / "after", 3)
    beta1, beta2, epsilon, decay = 0.9, 0.999, 1e-8, 0.01
    names = [name for name in before if not name.startswith("optimizer.")]
    assert len(names) > 5
    for name in names:
        first, second = f"optimizer.state.exp_avg.{name}", f"optimizer.state.exp_avg_sq.{name}"
        gradient = (after[first] - beta1 * before[first]) / (1 - beta1)
        assert gradient.abs().max() > 0
        assert_close(after[second], beta2 * before[second] + (1 - beta2) * gradient**2, "resumed step")
        step = after[first] / (1 - beta1**3) / ((after[second] / (1 - beta2**3)).sqrt() + epsilon)
        shrunk = before[name] * (1 - rate * (0 if "norm" in name else decay))
        assert_close(after[name], shrunk - rate * step, "resumed step")


@pytest.mark.slow
def test_a_job_that_saves_no_optimizer_goes_on_with_the_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    """Megatron 0.19 asks the checkpoint for what the job would save, and ends in a KeyError."""
    plain, bare = (
        run(tmp_path / name, *STEPS, "--load", str(checkpoint), *words).losses
        for name, words in (("plain", []), ("bare", ["--no-save-optim", "--no-save-rng"]))
    )
    assert [*plain] == [3, 4]
    assert bare == plain


def test_what_is_not_saved_is_asked_for_while_loading_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    args = Namespace(no_save_optim=True, no_save_rng=None)
    monkeypatch.setattr(unsaved, "get_args", lambda: args)
    seen = unsaved.load_checkpoint(lambda *rest, **named: (args.no_save_optim, args.no_save_rng, rest, named), "model", n=1)
    assert seen == (None, None, ("model",), {"n": 1})
    with pytest.raises(KeyError):
        unsaved.load_checkpoint({}.__getitem__, "model")
    assert (args.no_save_optim, args.no_save_rng) == (True, None)


def test_another_rate_without_a_flag_is_refused_before_ranks_meet(checkpoint: Path, tmp_path: Path) -> None:
    log = refused(tmp_path, *STEPS, "--load", str(checkpoint), "--lr", str(NEW))
    assert f"--lr ({NEW}, was {SAVED})" in log
    assert f"add {resume.OVERRIDE} to go on with what is asked for, {resume.KEEP}" in log


def words(*more: str) -> Namespace:
    """As the check on a login node parses those of the run in `checkpoint`."""
    same = ["--train-iters", "4", "--global-batch-size", "2", "--lr", str(SAVED), "--lr-decay-style", "constant"]
    return check.parse([*same, *more])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", ""),
        ("--lr 1e-3", "--lr (0.001, was 0.005)"),
        ("--min-lr 1e-3", "--min-lr (0.001, was 0.0)"),
        ("--train-iters 6", "--train-iters, --lr-decay-iters or --global-batch-size (12, was 8 samples)"),
        ("--lr-decay-style cosine", "--lr-decay-style (cosine, was constant)"),
        ("--lr-warmup-fraction 0.5", "--lr-warmup-iters, -samples or -fraction (4.0, was 0 samples)"),
        ("--weight-decay 0.1", "--weight-decay or --start-weight-decay (0.1, was 0.01)"),
        ("--decoupled-lr 1e-3", "--decoupled-lr 0.001 makes other groups"),
        ("--decoupled-lr 1e-3 --override-opt-param-scheduler", "leave it out, or add --no-load-optim"),
        (
            "--adam-beta2 0.95",
            "with --adam-beta2 (0.95, was 0.999) give what it was, or add --no-load-optim",
        ),
        (
            "--adam-beta1 0.8 --adam-eps 1e-6 --override-opt-param-scheduler",
            "--adam-beta1 (0.8, was 0.9); --adam-eps (1e-06",
        ),
        ("--optimizer sgd", "--optimizer (sgd, was adam)"),
        ("--adam-beta2 0.95 --no-load-optim", ""),
        ("--sgd-momentum 0.5 --muon-momentum 0.95", ""),  # which Adam does not read
        (
            "--use-distributed-optimizer",
            "was saved without --use-distributed-optimizer, and its state is of that form alone: leave",
        ),
        ("--bf16", "was saved without --bf16 or --fp16, and its state is of that form alone: leave it out"),
        ("--bf16 --no-load-optim", ""),
        ("--lr 1e-3 --override-opt-param-scheduler", ""),
        ("--lr 1e-3 --use-checkpoint-opt-param-scheduler", ""),
        ("--lr 1e-3 --finetune", ""),
        ("--lr 1e-3 --no-load-optim", ""),
        ("--lr 1e-3 --skip-train", ""),
        ("--lr 1e-3 --ckpt-step 1", ""),  # it is not there, as Megatron will say
    ],
)
def test_what_a_checkpoint_is_held_to(more: str, message: str, checkpoint: Path) -> None:
    found = "\n".join(resume.problems(words(*more.split()), checkpoint))
    assert (message in found) if message else not found


def test_what_the_optimizer_was_begun_with_goes_on() -> None:
    """Why another is refused: a state brings its groups, and they win."""
    from megatron.core.optimizer import OptimizerConfig

    old, new = (torch.optim.AdamW([torch.zeros(1, requires_grad=True)], betas=(0.9, b), eps=b / 1e8) for b in (0.999, 0.95))
    new.load_state_dict(old.state_dict())
    assert (new.param_groups[0]["betas"], new.param_groups[0]["eps"]) == ((0.9, 0.999), 0.999e-8)
    assert {name for names in resume.OF_OPTIMIZER.values() for name in names} <= {
        field.name for field in fields(OptimizerConfig)
    }


def test_sgd_goes_on_with_momentum_anew(tmp_path: Path) -> None:
    """Megatron asks for a state that its SGD does not make, and ends in a TypeError. Without momentum nothing is lost."""
    folder, sgd = tmp_path / "checkpoint", [*STEPS, "--optimizer", "sgd", "--sgd-momentum", "0"]
    whole = run(tmp_path / "whole", *sgd, "--save", str(folder), "--save-interval", "1", "--exit-interval", "2")
    (folder / stored.TRACKER).write_text("1")
    log = refused(tmp_path / "refused", *sgd, "--load", str(folder))
    assert "--optimizer sgd cannot go on" in log
    assert "add --no-load-optim" in log
    gone_on = run(tmp_path / "on", *sgd, "--load", str(folder), "--no-load-optim", "--exit-interval", "2")
    assert gone_on.losses == {2: whole.losses[2]}


def test_an_optimizer_that_was_shared_out_or_of_half_precision(tmp_path: Path) -> None:
    def found(*more: str, **was: bool) -> list[str]:
        before = {"args": Namespace(**was), "opt_param_scheduler": {}}
        torch.save(before, tmp_path / "iter_0000007" / "common.pt")
        return [*resume.problems(words(*more), tmp_path)]

    (tmp_path / stored.TRACKER).write_text("7")
    (tmp_path / "iter_0000007").mkdir()
    assert (
        "was saved with --use-distributed-optimizer, and its state is of that form alone: add it"
        in found(use_distributed_optimizer=True)[0]
    )
    assert "was saved with --bf16 or --fp16" in found(bf16=True)[0]
    assert not found("--fp16", bf16=True)
    assert not found("--use-distributed-optimizer", bf16=True, use_distributed_optimizer=True)
    assert not found("--optimizer", "dist_muon", "--use-distributed-optimizer", use_distributed_optimizer=False)


@pytest.mark.parametrize(
    ("name", "given", "default", "flag"),
    [("qk_layernorm", True, False, "--qk-layernorm"), ("softmax_type", "learnable", "vanilla", "--softmax-type learnable")],
)
def test_weights_that_the_model_or_the_checkpoint_lacks(name: str, given: Any, default: Any, flag: str) -> None:
    """Megatron drops the former without a word, and ends without the latter once it loads."""

    def said(before: Any, now: Any, **more: Any) -> list[str]:
        args = Namespace(**{"attention": "lighthouse", name: now, **more})
        return [*resume.attention_problems(args, Namespace(**{name: before}), Path("run"), Path("run/iter_0000001"))]

    assert said(given, given) == said(default, default) == said(None, given) == []
    assert said(given, default, drop_attention_weights=True) == said(default, given, dist_ckpt_strictness="log_all") == []
    assert said(given, default, use_checkpoint_args=True) == []
    (lost,) = said(given, default)
    assert f"trained with {flag}" in lost
    assert f"add {flag}, or --drop-attention-weights" in lost
    (missing,) = said(default, given)
    assert f"trained without {flag}" in missing
    resumed = {"drop_attention_weights": True, "use_distributed_optimizer": True, "dist_ckpt_strictness": "log_all"}
    resumed |= {"skip_train": False, "finetune": False, "no_load_optim": False}
    for before, now, word in ((given, default, "with"), (default, given, "without")):
        (flat,) = said(before, now, **resumed)
        assert f"was trained {word} {flag}" in flat
        assert "add --no-load-optim, and the optimizer begins anew" in flat
        assert said(given, given, **resumed) == []
        for other in ("skip_train", "finetune", "no_load_optim"):
            assert said(before, now, **{**resumed, other: True}) == []


def test_a_hybrid_model_has_the_layers_of_its_checkpoint() -> None:
    def said(before: str | None, now: str | None) -> list[str]:
        args, was = (Namespace(hybrid_layer_pattern=pattern) for pattern in (now, before))
        return [*resume.attention_problems(args, was, Path("run"), Path("run/iter_0000001"))]

    assert said("*-*-", "*-|*-/*") == said(None, "*-*-") == []
    (problem,) = said("*-|*-", "**--")
    assert "is of layers *-*-, and --hybrid-layer-pattern of **--: give its own" in problem


def test_no_checkpoint_is_no_problem(tmp_path: Path) -> None:
    assert [*resume.problems(words(), None), *resume.problems(words(), tmp_path)] == []
    (tmp_path / stored.TRACKER).write_text("release")
    assert [*resume.problems(words(), tmp_path)] == []
    (tmp_path / stored.TRACKER).write_text("2")
    (tmp_path / "iter_0000002").mkdir()
    assert [*resume.problems(words(), tmp_path)] == []
    (tmp_path / "iter_0000002" / "common.pt").write_bytes(b"cut off")
    assert [*resume.problems(words(), tmp_path)] == []


class Newer:
    """Pickled, the properties of a tensor by a torch that knows more of them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorProperties, (), tuple(range(9))


def test_a_checkpoint_of_a_newer_torch_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Torch would end in unpacking, after ranks have met. A machine that only queues may have another torch than the run."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    (folder / "iter_0000002/.metadata").write_bytes(pickle.dumps(Newer()))
    args = words("--load", str(folder))
    with pytest.raises(ValueError, match=r"iter_0000002/\.metadata cannot be read by torch .*unpack.*newer torch"):
        resume.check_resume(args)
    assert [*resume.problems(args, folder)] == []


def test_releases_before_kept_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / stored.TRACKER).write_text("7")
    (tmp_path / "iter_0000007").mkdir()
    before = {
        "args": Namespace(no_save_optim=True, other=FileSystemReader),
        "opt_param_scheduler": {},
    }
    torch.save(before, tmp_path / "iter_0000007" / "common.pt")
    assert ["saved with --no-save-optim" in text for text in resume.problems(words(), tmp_path)] == [True]


def test_the_schedule_is_megatrons(checkpoint: Path) -> None:
    """Every entry that Megatron compares is compared here: what its scheduler saved, but for how far it has come."""
    state = stored.common_state(checkpoint, 2)
    assert state is not None
    saved = {name: value for name, value in state["opt_param_scheduler"].items() if name != "num_steps"}
    assert resume.schedule(words()) == saved
    assert set(saved) == set(resume.FLAGS)


def test_what_is_no_part_of_the_arguments_is_passed_over(tmp_path: Path) -> None:
    """A dict of a kind of its own, and a set, in what all ranks have in common."""
    others = {"counted": Counter("ab"), "by": defaultdict(list, {1: [2]}), "kinds": {Path("a")}, "iteration": 7}
    torch.save(others, tmp_path / "common.pt")
    state = stored.common_state_of(tmp_path)
    assert state is not None
    assert state["iteration"] == 7


def test_ranks_files_go_on_as_they_were_trained(tmp_path: Path) -> None:
    """Megatron's `torch` format, by runs: the checkpoint's rope is taken, and another attention is refused with the remedy."""
    folder = tmp_path / "checkpoint"
    save = ["--save", str(folder), "--save-interval", "1", "--train-iters", "2", "--ckpt-format", "torch"]
    begun = run(tmp_path / "a", "--attention", "lighthouse", "--lighthouse-rope", "mean", *save)
    (folder / stored.TRACKER).write_text("1")
    gone_on = run(tmp_path / "b", "--attention", "lighthouse", *save, "--load", str(folder))
    assert "--lighthouse-rope mean is taken" in gone_on.log
    assert gone_on.losses == {2: begun.losses[2]}
    other = " ".join(resume.problems(words("--attention", "parallax", "--load", str(folder)), folder))
    assert "of the format torch" in other
    assert "--ckpt-convert-format torch_dist" in other
