"""A trained checkpoint as a function: Megatron builds and loads the model, for forward passes alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import arguments, training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import (
    checkpoint_exists,
    get_checkpoint_name,
    get_checkpoint_tracker_filename,
    load_args_from_checkpoint,
    read_metadata,
)
from megatron.training.global_vars import get_tokenizer, set_global_variables
from torch import Tensor

from megatron_lighthouse.bars import bar
from megatron_lighthouse.mcore.attention.document_rotary import rotate_by
from megatron_lighthouse.mcore.attention.fused_spec import with_fused_attention
from megatron_lighthouse.mcore.attention.packed import packed
from megatron_lighthouse.mcore.command_line import conversations, flags, pyramid
from megatron_lighthouse.mcore.command_line.arguments import (
    ArgumentsProvider,
    model_config,
    use_attention,
    with_lighthouse_arguments,
)
from megatron_lighthouse.mcore.command_line.documents import FLAG, asked
from megatron_lighthouse.mcore.command_line.from_checkpoint import explained
from megatron_lighthouse.mcore.command_line.run_options import check_run_options
from megatron_lighthouse.mcore.data import text
from megatron_lighthouse.mcore.data.documents import documents_until
from megatron_lighthouse.mcore.loop import hooks, pretrain
from megatron_lighthouse.mcore.loop.further_tokens import ends_of
from megatron_lighthouse.recipe.of_run import of_one_sequence
from megatron_lighthouse.recipe.readers import BYTES, Reader, reader_of
from megatron_lighthouse.recipe.refused import Refused, raise_all
from megatron_lighthouse.recipe.same_model import check_same_model
from megatron_lighthouse.recipe.which_attention import settle_attention

type Array = numpy.ndarray[Any, Any]


@dataclass(frozen=True)
class Trained:
    """A model with the weights of a checkpoint."""

    args: argparse.Namespace
    iteration: int
    """Of the checkpoint."""
    model: torch.nn.Module
    """Megatron's GPT model, in evaluation mode; this tensor-parallel rank's part."""
    reader: Reader = BYTES
    """How text becomes its tokens."""

    def token_losses(self, tokens: Array, inputs: Array | None = None) -> Array:
        """[s + 1] tokens -> [s] losses of the last s, each after those before it, in nats, fp32.

        Given `inputs`, [s] tokens, the model reads these in place of the first s; the losses still are those of `tokens`.
        """
        read = tokens[:-1] if inputs is None else inputs
        given, labels = (torch.from_numpy(x.astype(numpy.int64)).cuda().unsqueeze(0) for x in (read, tokens[1:]))
        return self._forward(given, labels=labels)[0].float().cpu().numpy()

    def next_token(self, tokens: Array) -> Array:
        """[s] tokens -> [vocabulary] logits of the token after the last, fp32."""
        given = torch.from_numpy(tokens.astype(numpy.int64)).cuda().unsqueeze(0)
        hook = get_attr_wrapped_model(self.model, "output_layer").register_forward_pre_hook(_last_row)
        try:
            return self._forward(given, runtime_gather_output=True)[0, -1].float().cpu().numpy()
        finally:
            hook.remove()

    @torch.no_grad()
    def _forward(self, tokens: Tensor, **how: Any) -> Tensor:
        """One sequence, causal, as a training run without attention masks; of documents, where the run packs them."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        if asked(self.args):
            assert self.reader.end is not None
            documents = documents_until(tokens[0], self.reader.end)
            positions = documents.positions.unsqueeze(0)
            rotate_by(get_attr_wrapped_model(self.model, "decoder", return_model_obj=True), positions)
            ends = ends_of(documents, tokens, self.reader.end)
            how["packed_seq_params"] = packed(documents, tokens.shape[1], ends, positions)
        return self.model(tokens.contiguous(), positions, None, **how)


def _last_row(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of an output layer's input [s/ranks, b, h] the last row of each sequence-parallel rank: logits of all would not fit."""
    hidden, *others = args
    return hidden[-1:], *others


def parse(add_arguments: ArgumentsProvider, refused: Refused) -> tuple[argparse.Namespace, int | None]:
    """Megatron's arguments and those of the entry point, so that a run's own command line is understood, and what is added.

    Args:
        refused: keeps a checkpoint that is not there or holds another model, options and a layout that are not supported.

    Returns:
        The arguments, and the checkpoint's iteration: None where there is none.

    Raises:
        ValueError: words that cannot be read, or a checkpoint that is not there and should say what the model is.
    """
    hooks.adapt_machine()
    hooks.load_weights()
    hooks.keep_documents_apart()
    hooks.tile()
    sys.argv[1:] = of_one_sequence(sys.argv[1:])
    everything = with_lighthouse_arguments(_with(add_arguments))
    raise_all(flags.parse(sys.argv[1:], everything, strict=flags.installed() == flags.VERSION)[1])
    args = parse_args(everything)
    iteration = iteration_there(args) if args.use_checkpoint_args else refused.ask(iteration_there, args)
    if args.use_checkpoint_args:
        load_args_from_checkpoint(args)
    if args.tokenizer_type is None:
        text.use_bytes(args)
    _leave_training(args)
    for name in ("context_parallel_size", "pipeline_model_parallel_size"):  # before Megatron divides the ranks by them
        if getattr(args, name) != 1:
            flag = "--" + name.replace("_", "-")
            refused.said.append(
                f"{flag} {getattr(args, name)}: an evaluation splits neither sequences nor layers over ranks. Use {flag} 1: "
                "a checkpoint loads in any layout, and more ranks share out the samples."
            )
            setattr(args, name, 1)
    with mock.patch.object(arguments, "_print_args"):  # hundreds of lines, which stand in the run's own log
        try:
            validate_args(args)
        except Exception:
            refused.end()  # of a line that was refused before, Megatron's own words may be about what is no more
            raise
    set_global_variables(args)
    args.skip_train = args.no_load_optim = args.no_load_rng = True  # no optimizer is made
    args.finetune, args.save = False, None
    args.train_samples = None  # a run's: in batches of another size they are other iterations
    refused.ask(explained(args, _with(add_arguments))(check_run_options), args)
    if iteration is not None:
        refused.ask(check_same_model, args, stored_arguments(args))
    pyramid.settle(args)
    settle_attention(args, iteration or 0)
    return args, iteration


def _leave_training(args: argparse.Namespace) -> None:
    """Of a run's arguments: what does not fit one sequence at a time on each of any number of ranks, and the run's own logs."""
    args.micro_batch_size = 1
    args.global_batch_size = args.eval_global_batch_size = args.eval_micro_batch_size = None  # Megatron's: one a rank
    args.rampup_batch_size = args.step_batch_size_schedule = args.phase_transition_iterations = None
    args.override_ckpt_iteration = None  # would be refused for the batch size
    args.tensorboard_dir = args.wandb_project = None
    args.enable_one_logger = False
    args.lighthouse_telemetry_layers = None
    for name in [name for name in vars(args) if name.endswith("_telemetry_interval")]:
        setattr(args, name, 0)


def _with(add_arguments: ArgumentsProvider) -> ArgumentsProvider:
    return lambda parser: add_arguments(pretrain.add_arguments(parser))


def load(args: argparse.Namespace) -> Trained:
    """Start Megatron, build the model and load the checkpoint. Every rank calls it.

    Raises:
        ValueError: what Lighthouse refuses, before the process group exists.
    """
    with explained(args, with_lighthouse_arguments(pretrain.add_arguments)):
        model_cfg = with_fused_attention(use_attention(args, model_config(args)))
    container = pretrain_cfg_container_from_args(args, model_cfg)
    training.initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    kind = ModelType.encoder_or_decoder
    models, _, _ = training.setup_model_and_optimizer(kind, cfg_container=container, pg_collection=groups)
    return Trained(args, args.iteration, models[0].eval(), reader(args))


def reader(args: argparse.Namespace) -> Reader:
    """How text becomes tokens of the model. After `parse`, by which Megatron has built the tokenizer.

    Raises:
        ValueError: a tokenizer that reads no text, or does not end documents where these are to be told apart.
    """
    if conversations.asked(args):
        raise ValueError(
            f"{conversations.FLAG}: a checkpoint of conversations is not evaluated on text by its own arguments: follow its "
            "validation loss (--eval-iters)."
        )
    found = BYTES if text.reads_bytes(args) else reader_of(get_tokenizer(), args.tokenizer_type)
    if asked(args) and found.end is None:
        raise ValueError(
            f"{FLAG} tells documents apart by the token at their end, and --tokenizer-type {args.tokenizer_type} has none: "
            "leave it out."
        )
    return found


def iteration_there(args: argparse.Namespace) -> int:
    """Of the checkpoint that `args` name; 0 of a release.

    Raises:
        ValueError: there is none.
    """
    if not checkpoint_exists(args.load):
        raise ValueError(f"--load {args.load} holds no checkpoint: name the folder that the run was given as --save.")
    if not Path(_folder(args)).is_dir():
        there = ", ".join(sorted(path.name for path in Path(args.load).glob("iter_*")))
        raise ValueError(f"--load {args.load} has no {Path(_folder(args)).name}: give --ckpt-step one of {there}.")
    return args.ckpt_step or read_metadata(get_checkpoint_tracker_filename(args.load))[0]


def _folder(args: argparse.Namespace) -> str:
    iteration, release = read_metadata(get_checkpoint_tracker_filename(args.load))
    return get_checkpoint_name(args.load, args.ckpt_step or iteration, release and not args.ckpt_step, return_base_dir=True)


def stored_arguments(args: argparse.Namespace) -> argparse.Namespace | None:
    """Those of the run that made the checkpoint; None where it does not say, or in another format."""
    folder = _folder(args)
    if not dist_checkpointing.check_is_distributed_checkpoint(folder):
        return None
    return dist_checkpointing.load_common_state_dict(folder).get("args")


def training_text(args: argparse.Namespace) -> list[str]:
    """What the run that made the checkpoint was given as --text-data; nothing for other data or formats."""
    return getattr(stored_arguments(args), "text_data", None) or []


def check_not_trained_on(held_out: Iterable[Path], trained_on: Iterable[str]) -> None:
    """Refuse to call held out what a run was given to read. Compares paths, so it cannot tell copies.

    Raises:
        ValueError: a file of `held_out` that is among `trained_on`.
    """
    there = [path for path in trained_on if Path(path).exists()]
    read = {file.resolve() for file in (text.text_files(there) if there else [])}
    both = sorted(file for file in held_out if file.resolve() in read)
    if both:
        raise ValueError(
            f"--held-out {both[0]} was read in training (--text-data of the checkpoint): hold other text out, as "
            "megatron_lighthouse.recipe.corpus does."
        )


def over_ranks(count: int, columns: int, compute: Callable[[int], Any], title: str) -> Array:
    """[count, columns] float64 results of `compute`, shared out over the data-parallel ranks. Every rank calls it.

    All ranks compute as often, so that none waits where models communicate across data-parallel ranks, as experts do.
    """
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    results = torch.zeros(count, columns, dtype=torch.float64, device="cuda")
    for turn in bar(range(-(-count // size)), desc=title, disable=torch.distributed.get_rank() != 0):
        index = turn * size + rank
        computed = torch.as_tensor(compute(min(index, count - 1)), dtype=torch.float64)
        if index < count:
            results[index] = computed
    torch.distributed.all_reduce(results, group=mpu.get_data_parallel_group())
    return results.cpu().numpy()
