"""What `check` asks of Megatron itself, where it can be imported: its parser, its rules, and then all that a run refuses.

There is no process group and no GPU: what the job will have stands in their place. Megatron is imported late: it takes seconds.
"""

from __future__ import annotations

import os
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from types import SimpleNamespace
from unittest import mock

from megatron_lighthouse.launch.data_files import Sees, here
from megatron_lighthouse.mcore.command_line import flags
from megatron_lighthouse.mcore.data import tokenizers
from megatron_lighthouse.mcore.data.blends import TOKENIZERS
from megatron_lighthouse.mcore.refusal import sentences

LOCAL_SAVES = "nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager"
"""Whose LocalCheckpointManager is asked for by --non-persistent-ckpt-type local."""
ADAM = "transformer_engine.pytorch.optimizers"
"""Whose FusedAdam a precision-aware optimizer asks Transformer Engine for, with these arguments."""


class _FusedAdam:
    def __init__(
        self, master_weight_dtype: object, exp_avg_dtype: object, exp_avg_sq_dtype: object, use_decoupled_grad: object
    ) -> None: ...


NEWEST = "99"
"""Of Transformer Engine, where it is the job's and not here: its release is asked for by Megatron's rules."""
OF_ENGINE = {
    "models.common.embeddings.rope_utils": ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"),
    "transformer.moe.moe_utils": (
        *("fused_permute", "fused_permute_with_probs", "fused_unpermute"),
        *("fused_sort_chunks_by_index", "fused_sort_chunks_by_index_with_probs"),
    ),
}
"""Names of megatron.core that are None without Transformer Engine, and that its rules look at."""
PLACE = 128256
"""Rows of the vocabulary where a tokenizer says so that is not here."""


def can_be_asked() -> bool:
    """Whether Megatron, of the release that this project is for, can be imported."""
    return flags.installed() is not None and find_spec("megatron") is not None and find_spec("megatron.training") is not None


def problems(words: Sequence[str], world: int, major: int, sees: Sees, runs_here: bool) -> list[str]:
    """What Megatron, or a run, refuses of a command line; each in a sentence or more.

    Args:
        world: GPUs of the job.
        major: their compute capability, which some of Megatron's rules ask for; 0: there are none.
        runs_here: whether the job's Python is this one, so that what it lacks is refused.
    """
    said = StringIO()
    with _of_the_job(words, world, major, runs_here), redirect_stdout(said), redirect_stderr(said):
        try:
            _refuse(words, sees, runs_here)
        except SystemExit:  # its parser's, and for one option that is no longer
            return [said.getvalue().strip().splitlines()[-1]]
        except Exception as error:  # what Megatron meets while it parses: of any kind, as for a run
            return sentences(error)
    return []


def _refuse(words: Sequence[str], sees: Sees, runs_here: bool) -> None:
    """As `mcore.loop.pretrain.run`, but without its global variables: the tokenizer, TensorBoard's writer."""
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.checkpointing import load_args_from_checkpoint

    from megatron_lighthouse.mcore.command_line.entry import checked_model, with_all_arguments

    args = parse_args(with_all_arguments)
    for name in ("load", "pretrained_checkpoint", "tokenizer_model", "vocab_file", "merge_file"):
        if (path := getattr(args, name)) and here(sees, path).exists():
            setattr(args, name, str(here(sees, path)))
    if args.use_checkpoint_args:
        load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
        load_args_from_checkpoint(args)
    validate_args(args)
    _settle_vocabulary(args)
    pretrain_cfg_container_from_args(args, checked_model(args, packages=runs_here))


def _settle_vocabulary(args: Namespace) -> None:
    """By the tokenizer where its files and its package are here; else a number in its place, on which no rule depends."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    files = [getattr(args, name[2:].replace("-", "_")) for name in TOKENIZERS]
    at_hand = any(path and os.path.exists(path) for path in files) or args.tokenizer_type in tokenizers.NULL
    if at_hand and all(find_spec(package) for package in tokenizers.packages(args.tokenizer_type)):
        build_tokenizer(args)
    if args.padded_vocab_size is None and args.vocab_size is None:
        args.padded_vocab_size = PLACE


def _layers_are_shared(words: Sequence[str]) -> bool:
    """Whether several ranks work at a layer."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--tensor-model-parallel-size", "--context-parallel-size"):
        parser.add_argument(flag, type=int, default=1)
    return max(vars(parser.parse_known_args(words)[0]).values()) > 1


@contextmanager
def _of_the_job(words: Sequence[str], world: int, major: int, runs_here: bool) -> Iterator[None]:
    """As the first rank of the job sees it; without what libraries have to say of this machine."""
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}
    if major < 10 and _layers_are_shared(words):  # as launch/environment.sh does
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(mock.patch.object(sys, "argv", ["pretrain_gpt", *words]))
        for name, answer in (
            ("get_device_properties", SimpleNamespace(name="", major=major, minor=0, total_memory=0)),
            ("get_device_capability", (major, 0)),
        ):
            stack.enter_context(mock.patch(f"torch.cuda.{name}", lambda *_, answer=answer: answer))
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            import megatron.core.utils as utils
            import megatron.training  # noqa: F401
        if not runs_here and not find_spec("nvidia_resiliency_ext"):
            stack.enter_context(mock.patch.dict(sys.modules, {LOCAL_SAVES: SimpleNamespace(LocalCheckpointManager=object)}))
        if not runs_here and not find_spec("transformer_engine"):
            stack.enter_context(mock.patch.object(utils, "_te_version", utils.PkgVersion(NEWEST)))
            stack.enter_context(mock.patch.dict(sys.modules, {ADAM: SimpleNamespace(FusedAdam=_FusedAdam)}))
            for module, names in OF_ENGINE.items():
                for name in names:
                    stack.enter_context(mock.patch(f"megatron.core.{module}.{name}", object()))
        yield
