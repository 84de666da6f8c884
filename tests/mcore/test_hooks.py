"""Every patch of Megatron's training loop stands in one file, and wraps once however often it is installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import megatron_lighthouse
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from tests import left

ROOT = Path(megatron_lighthouse.__file__).parent
PATCHED = (
    *("training_log", "load_checkpoint", "train_step", "dummy_train_step", "save_checkpoint"),
    "checkpoint_and_decide_exit",
)
WITHOUT_MEGATRON = ("settings", "checks", "arguments", "stage", "layers", "resume", "stored")


def test_a_subject_wraps_once_and_the_last_is_outermost() -> None:
    from megatron_lighthouse.mcore.loop.hooks import MARK, wrap

    owner = SimpleNamespace(add=lambda x, y=0: x + y)
    for _ in range(2):
        wrap(owner, "add", "ten", lambda add, x, **named: 10 * add(x, **named))
        wrap(owner, "add", "one", lambda add, x, **named: 1 + add(x, **named))
    assert owner.add(2, y=3) == 51
    assert getattr(owner.add, MARK) == ("ten", "one")


def test_installing_again_changes_nothing(megatron: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer import multi_token_prediction
    from megatron.training import checkpointing, initialize
    from megatron.training import training as loop
    from megatron.training.models import gpt

    from megatron_lighthouse.mcore.loop import hooks

    owners = [(loop, name) for name in (*PATCHED, *(() if torch.cuda.is_available() else ("initialize_megatron",)))]
    owners += [(initialize, "_compile_dependencies"), (checkpointing, "_async_delete_checkpoint_impl"), *model_parts()]
    owners += [(multi_token_prediction, "roll_tensor"), (gpt, "mtp_block_spec")]

    def installed() -> list[Any]:
        hooks.adapt_machine()
        hooks.follow_training()
        hooks.follow_switch(LighthouseSettings())
        return [getattr(owner, name) for owner, name in owners]

    for owner, name in owners:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # so that all is undone
    before, mended = [getattr(owner, name) for owner, name in owners], list[bool]()
    monkeypatch.setattr(hooks.te_flash, "mend", lambda: mended.append(True))
    hooks.adapt_machine()
    assert mended, "for evaluations too"
    once = installed()
    assert all(now is not was and getattr(now, hooks.MARK) for now, was in zip(once, before, strict=True))
    assert all(now is was for now, was in zip(installed(), once, strict=True))
    # so that a tiled loss sees the mask that documents made
    assert getattr(multi_token_prediction.roll_tensor, hooks.MARK) == ("documents", "tiled loss")


def test_hooks_are_found_and_undone(megatron: None) -> None:
    """As they are after each test: those after it find Megatron as it is."""
    from megatron.training import training as loop

    from megatron_lighthouse.mcore.loop import hooks

    owners = [(loop, "training_log"), (loop, "train_step"), *model_parts()]
    before = [getattr(owner, name) for owner, name in owners]
    assert not [*left.hooks()]
    hooks.follow_training()
    hooks.follow_switch(LighthouseSettings())  # a second time around `train_step`
    assert {(owner, name) for owner, name, _ in left.hooks()} >= {*owners}
    left.unhook()
    assert [getattr(owner, name) for owner, name in owners] == before


def model_parts() -> list[tuple[Any, str]]:
    """What `hooks.tile` and `hooks.load_weights` wrap."""
    from megatron.core.models.gpt import gpt_model
    from megatron.core.models.hybrid import hybrid_model
    from megatron.core.transformer import mlp, multi_token_prediction
    from megatron.training import checkpointing

    models = [(owner, "forward") for owner in (mlp.MLP, gpt_model.GPTModel, hybrid_model.HybridModel)]
    mtp = (multi_token_prediction, "_compute_mtp_acceptance_counts")
    return [*models, mtp, (checkpointing, "_load_global_dist_base_checkpoint")]


def test_a_model_outside_the_training_loop_takes_no_tiles(megatron: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lighthouse.mcore.loop import hooks
    from tests.mcore.test_output import loss, model

    one = model(True)
    expected = loss(one)
    for owner, name in model_parts():
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, getattr(inner, "__wrapped__", inner))
    hooks.tile()
    assert torch.equal(loss(one), expected)


def test_no_other_file_patches_megatron() -> None:
    found = {str(file.relative_to(ROOT)) for file in ROOT.rglob("*.py") if _patches(ast.parse(file.read_text()))}
    assert _patches(ast.parse("from megatron.training import training as loop\nloop.train_step = None"))
    assert _patches(ast.parse("from megatron.training import training as loop\nsetattr(loop, 'train_step', None)"))
    assert found == set()


def _patches(tree: ast.Module) -> bool:
    """Whether a name that is imported from Megatron is assigned an attribute; `wrap` has it as an argument."""
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = [(getattr(node, "module", None), alias) for node in imports for alias in node.names]
    names = {a.asname or a.name.partition(".")[0] for m, a in modules if (m or a.name).partition(".")[0] == "megatron"}
    targets = [t for node in ast.walk(tree) if isinstance(node, ast.Assign) for t in node.targets]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    owners = [t.value for t in ast.walk(ast.Module(targets, [])) if isinstance(t, ast.Attribute)]  # type: ignore[arg-type]
    owners += [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "setattr"]
    return any(isinstance(owner, ast.Name) and owner.id in names for owner in owners)


def test_what_a_login_node_asks_imports_no_megatron() -> None:
    modules = [f"megatron_lighthouse.mcore.command_line.{name}" for name in WITHOUT_MEGATRON]
    program = f"import sys, {', '.join(modules)}\nprint([m for m in sys.modules if m.partition('.')[0] == 'megatron'])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert answer.strip() == "[]"
