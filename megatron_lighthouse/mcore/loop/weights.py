"""A checkpoint of another attention: the weights of streams that it lacks begin anew, those that the model lacks are dropped.
So do the scales of FP8 attention, which one that was trained without has not.

Every other difference is as Megatron treats it: it refuses what a checkpoint lacks.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.training.checkpointing import get_checkpoint_name
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_lighthouse.mcore.attention import scales
from megatron_lighthouse.mcore.command_line import rope
from megatron_lighthouse.mcore.command_line.resume import attention_problems
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.variant import norm_of
from megatron_lighthouse.variants import DENSE, streams_in


def load_base(
    load: Callable[..., Any],
    load_dir: str,
    args: Namespace,
    rank0: bool,
    sharded_state_dict: dict[str, Any] | None,
    iteration: int,
    release: bool,
    *rest: Any,
    **named: Any,
) -> Any:
    """Around Megatron's load of a `torch_dist` checkpoint.

    Raises:
        ValueError: an attention whose weights the model cannot take, or an optimizer that they do not fit.
    """
    given = (load_dir, args, rank0, sharded_state_dict, iteration, release, *rest)
    if sharded_state_dict is None:
        return load(*given, **named)
    folder = get_checkpoint_name(load_dir, iteration, release, return_base_dir=True)
    before = dist_checkpointing.load_common_state_dict(folder).get("args")
    if found := [*attention_problems(args, before, Path(load_dir), Path(folder))]:
        raise ValueError("\n".join(found))
    if not release and (problem := rope.loaded_problem(args, before, folder)):
        raise ValueError(problem)
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    there = {key for key in stored if not key.startswith("optimizer") and "_extra_state" not in key}
    unscaled = [*_unscaled(sharded_state_dict, stored)]
    lacking = [*_lacking(sharded_state_dict, args, there), *unscaled]
    for part, name, _ in lacking:
        del part[name]
    if names := sorted({weight.key for _, _, weight in lacking if _is_weight(weight)}):
        say_once(f"the checkpoint in {folder} has no {', '.join(names)}: these begin anew")
        _begin_at_zero([weight for _, _, weight in lacking if _is_weight(weight)], args)
    elif names := sorted(_of_streams(there, before) - _of_streams(there, args)):
        say_once(f"--attention {_attention(args)} has no {', '.join(names)}: these of the checkpoint in {folder} are dropped")
    if unscaled:
        say_once(f"the checkpoint in {folder} has no scales of FP8 attention: these begin anew")
    answer = load(*given, **named)
    for part, name, weight in lacking:
        part[name] = weight
    loaded = answer[0]
    for key, part in _parts(sharded_state_dict):
        missing = {name: weight.data for owner, name, weight in lacking if owner is part}
        loaded[key].update(missing)
    return answer


def _parts(state: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The model's chunks in this rank: 'model', or 'model0' and on."""
    return ((key, part) for key, part in state.items() if re.fullmatch(r"model\d*", key))


def _lacking(state: dict[str, Any], args: Namespace, there: Iterable[str]) -> list[tuple[dict[str, Any], str, Any]]:
    """What the model asks for of its streams, if the checkpoint has nothing of any of them: chunk, name there, and tensor."""
    if _of_streams(there, args):
        return []
    return [(part, name, part[name]) for _, part in _parts(state) for name in _of_streams(part, args)]


def _unscaled(state: dict[str, Any], stored: Collection[str]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The scales of attention that the model asks for, if the checkpoint has them not: chunk, name there, and their place."""
    for _, part in _parts(state):
        for name, found in part.items():
            if name.endswith(f".core_attention.{scales.NAME}") and found.unique_key not in stored:
                yield part, name, found


def _begin_at_zero(weights: Sequence[Any], args: Namespace) -> None:
    """Make the streams that are to be 0 at first so: by their norm's weights, where they have one.

    Zeros within a norm would do too, but its slope there is 1 / sqrt(epsilon): the first step would make them of unit size.
    """
    for stream in streams_in(args):
        if not stream.zero_at_first:
            continue
        own, norm = ([w for w in weights if f".{name}." in w.key] for name in (f"linear_{stream.name}", norm_of(stream)))
        centred = bool(norm) and getattr(args, "layernorm_zero_centered_gamma", False)
        for weight in norm or own:
            weight.data.detach().fill_(-1 if centred and weight.key.endswith(".weight") else 0)


def _attention(args: Namespace) -> str:
    """That of the run; with --spec alone Megatron's parser knows none."""
    return str(getattr(args, "attention", DENSE.name))


def _is_weight(found: Any) -> bool:
    return hasattr(found, "global_shape") and not found.key.endswith("_extra_state")


def _of_streams(keys: Iterable[str], args: Any) -> set[str]:
    """Those of `keys` that are of the streams of a run of these arguments."""
    modules = [f".self_attention.{name}." for one in streams_in(args) for name in (f"linear_{one.name}", norm_of(one))]
    return {key for key in keys if any(module in key for module in modules)}
