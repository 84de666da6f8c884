"""A resume with another learning rate: the checkpoint's groups of parameters keep their moments and take the run's rates.

Megatron 0.19 pairs the optimizer's groups with the checkpoint's by what is set for each, the rates among it, so that with
another `--lr` none is found, whatever `--override-opt-param-scheduler` says. And where a graph holds the optimizer's step
(`--optimizer-cuda-graph`) the rate is on the GPU, where it does not come back to from a checkpoint.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from megatron.training import get_args

RATES = ("max_lr", "min_lr")

type Group = dict[str, Any]


def load_checkpoint(load: Callable[..., Any], model: Any, optimizer: Any, *rest: Any, **named: Any) -> Any:
    """Around Megatron's: groups that differ in their rates alone pair, where the run says whose rates it takes."""
    args = get_args()
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:  # else Megatron asks for the same rates
        for one in _single(optimizer):
            one.load_state_dict = _pairing(one, keep=args.use_checkpoint_opt_param_scheduler)
    answer = load(model, optimizer, *rest, **named)
    for one in _single(optimizer):
        place(one.optimizer.param_groups, getattr(args, "optimizer_cuda_graph", False))
    return answer


def place(groups: Iterable[Group], captured: bool) -> None:
    """Have the learning rate and the number of steps where this run's Adam reads them. Changes them in place.

    Args:
        captured: whether a graph holds the step: then the rate is a tensor on the GPU of the group's parameters, else a number.
    """
    for group in groups:
        if group.get("step") is not None:
            group["step"] = int(group["step"])  # which Transformer Engine's counts on from, on the GPU too
        if isinstance(group["lr"], torch.Tensor) or captured:
            rate = float(group["lr"])
            device = next((one.device for one in group["params"]), None)
            group["lr"] = torch.tensor(rate, dtype=torch.float32, device=device) if captured else rate


def _single(optimizer: Any) -> list[Any]:
    """The optimizers with groups of their own; none where nothing is trained."""
    if hasattr(optimizer, "chained_optimizers"):
        return [one for part in optimizer.chained_optimizers for one in _single(part)]
    return [] if optimizer is None or optimizer.is_stub_optimizer else [optimizer]


def _pairing(optimizer: Any, keep: bool) -> Any:
    load = optimizer.load_state_dict

    @wraps(load)
    def load_state_dict(state: dict[str, Any]) -> None:
        inner = state.get("optimizer", state.get("optimizer_state_dict", state))
        saved, current = inner.get("param_groups", []), optimizer.optimizer.param_groups
        share_rates(*((saved, current) if keep else (current, saved)))
        load(state)

    return load_state_dict


def share_rates(source: Iterable[Group], target: Iterable[Group]) -> None:
    """Give `target`'s groups the rates of those of `source` that are otherwise alike. Changes them in place.

    Several that are alike but for their rates, as those of muP, pair from the lowest rate up, for what multiplies a rate is the
    same in both. Where their numbers differ nothing is changed, and Megatron refuses them.
    """
    for mine, theirs in zip(*_by_kind(source, target), strict=True):
        if len(mine) == len(theirs):
            for one, other in zip(mine, theirs, strict=True):
                other.update({rate: one.get(rate) for rate in RATES})


def _by_kind(*sides: Iterable[Group]) -> list[list[list[Group]]]:
    """Of each side the groups of every kind: what identifies one to Megatron, less the rates. The lowest rates first."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys as keys

    kinds: dict[tuple[Any, ...], list[list[Group]]] = defaultdict(lambda: [[] for _ in sides])
    for number, groups in enumerate(sides):
        for group in sorted(groups, key=lambda g: [g.get(rate) or 0.0 for rate in RATES]):
            kinds[tuple(group.get(key, group.get(f"pre_{key}")) for key in keys if key not in RATES)][number].append(group)
    return [list(groups) for groups in zip(*kinds.values(), strict=True)]
