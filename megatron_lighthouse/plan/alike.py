"""Which runs can be compared: those that differ in context-parallel ranks, or in length, alone. Ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_lighthouse.lighthouse.by_length import NAMES, by_length
from megatron_lighthouse.mcore.command_line import kept
from megatron_lighthouse.plan.model import FLAGS
from megatron_lighthouse.plan.run import recipes
from megatron_lighthouse.variants import VARIANTS

type Row = dict[str, Any]
MODEL = tuple(FLAGS)
OF_WORDS = {
    **{"scorer": "--lighthouse-scorer", "inner": "--lighthouse-inner", "steps": "--lighthouse-steps"},
    "transformer_impl": "--transformer-impl",
}
"""What the scripts' run.json says in the run's command line alone, by its flag."""
OF_SELECTION = (
    *("dense_first", "dense_last", "levels", "pooling", "budget", "tile_budget", "edge_budget"),
    *("scorer", "inner", "steps", "around"),
)
"""Settings that mean nothing to an attention that selects nothing."""
FOLLOWS = ("recompute", "levels", "budget", "tile_budget", "edge_budget")
"""Settings that may go with the length: along it they part runs only where a length has more than one of them."""
WORDS = {
    "recipe": "{}",
    "device": "{}",
    "dense_first": "{} dense first",
    "dense_last": "{} dense last",
    "edge_budget": "edge k {}",
    "around": "around {}",
    "levels": "L {}",
    "pooling": "p {}",
    "budget": "k {}",
    "scorer": "scorer {}",
    "inner": "inner {}",
    "steps": "steps {}",
    "transformer_impl": "{} layers",
    "tile_budget": "m {}",
    "recompute": "recompute {}",
    "cp_comm_type": "{}",
    "tensor_parallel": "TP {}",
    "pipeline_parallel": "PP {}",
    "micro_batches": "{} sequences a rank",
    "replicas_of": "all of {} GPUs",
    **{name: f"{name} {{}}" for name in MODEL if not name.startswith("dense")},
}
"""All that parts runs beside attention, ranks and length, and how a legend says it."""
PLAIN = {
    **{"recompute": "none", "cp_comm_type": "p2p", "tensor_parallel": 1, "pipeline_parallel": 1, "pooling": 4},
    **{"scorer": "norm", "inner": "auto", "steps": "auto", "transformer_impl": "transformer_engine", "around": "softmax"},
}


def kind(info: Row) -> Row:
    """What parts a run from others, of its run.json: by the names of `WORDS`; None where neither it nor its recipe says.

    `replicas_of` are the GPUs of a run that trains several sequences at a time, as where a job has more than a sequence needs.
    """
    table = recipes().get(str(info.get("recipe")), {})
    dense = {"dense_first": 2, "dense_last": 2}
    told = {**PLAIN, **(dense | table["model"] | table.get("lighthouse", {}) if table else {}), **_spoken(info), **info}
    if told.get("seq_length"):  # sizes that nobody gave are those of the length
        told |= by_length(told["seq_length"], told["pooling"], **{name: told[name] for name in NAMES if name in told})
    if told.get("device"):
        told["device"] = told["device"].lower()  # as the plan reads it
    attention = VARIANTS.get(str(info.get("attention")))
    if attention and not attention.selects:
        told |= dict.fromkeys(OF_SELECTION)
    if told.get("gpus") and told.get("context_parallel"):
        one = math.prod(told[name] for name in ("tensor_parallel", "context_parallel", "pipeline_parallel"))
        replicas = max(1, told["gpus"] // one)
        told["micro_batches"] = told.get("global_batch", replicas) / replicas
        told["replicas_of"] = told["gpus"] if replicas > 1 else None
    return {name: told.get(name) for name in WORDS}


def _spoken(info: Row) -> Row:
    words = str(info.get("arguments", "")).split()
    return {name: said for name, flag in OF_WORDS.items() if (said := kept.value(words, flag)) is not None}


def settle(rows: Sequence[Row]) -> None:
    """Let a run that has all its GPUs in one sequence go with those that share as many among more: a study ends with it."""
    for row in rows:
        alike = [r for r in rows if _same(r, row, but=("replicas_of",))]
        alone = {r["gpus"] for r in alike if not r["kind"]["replicas_of"]}
        if alone == {row.get("gpus")} and any(r["gpus"] == row["gpus"] and r["kind"]["replicas_of"] for r in alike):
            row["settled"] = row["gpus"]
    for row in rows:
        if settled := row.pop("settled", None):
            row["kind"]["replicas_of"] = settled


def _same(one: Row, other: Row, but: Iterable[str] = ()) -> bool:
    if one.get("attention") != other.get("attention"):
        return False
    return all(one["kind"][name] == other["kind"][name] for name in WORDS if name not in but)


def efficiency(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Give each run its tokens/s/GPU over that of the fewest ranks of its kind and length, the median where there are several.

    Returns:
        Folders of what could not be compared, and why.
    """
    notes: list[tuple[str, str]] = []
    for row in rows:
        if not row.get("tokens_s_gpu"):
            continue
        alike = [r for r in rows if r.get("tokens_s_gpu") and _comparable(r, row)]
        fewest = min(r["context_parallel"] for r in alike)
        if row["context_parallel"] > 1 and {r["context_parallel"] for r in alike} == {row["context_parallel"]}:
            notes.append((row["folder"], "no run of its kind and length on other ranks, so it has no efficiency"))
            continue
        base = statistics.median(r["tokens_s_gpu"] for r in alike if r["context_parallel"] == fewest)
        row["efficiency"] = round(row["tokens_s_gpu"] / base, 4)
    return notes


def _comparable(one: Row, other: Row) -> bool:
    """One rank exchanges nothing, by whichever scheme."""
    alone = 1 in (one["context_parallel"], other["context_parallel"])
    return one["seq_length"] == other["seq_length"] and _same(one, other, but=("cp_comm_type",) if alone else ())


def series(rows: Sequence[Row], across: str, other: str) -> list[tuple[str, list[Row]]]:
    """Lines of a plot along `across`, each of one kind, attention and `other`: its name, and its runs in the order of `across`.

    A name says what of the kind differs among the rows of its attention; of `FOLLOWS`, among those of its place. The lines are
    in the order of their values.
    """
    follows = FOLLOWS if across == "seq_length" else ()
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row["attention"], row[other], *(row["kind"][name] for name in WORDS if name not in follows))
        groups.setdefault(key, []).append(row)
    parted: list[tuple[tuple[Any, ...], str, list[Row]]] = []
    for group in groups.values():
        clash = [name for name in follows if _clash(group, across, name)]
        for chosen in _by(group, clash):
            first = chosen[0]
            own = [r for r in rows if r["attention"] == first["attention"]]
            here = _differ([r for r in own if r[other] == first[other]]) if not follows else clash
            names = [n for n in _differ(own) if n not in FOLLOWS or n in here]
            words = [WORDS[n].format(_shown(first["kind"][n])) for n in names if first["kind"][n] is not None]
            place = f"{first[other]:,} tokens" if other == "seq_length" else f"CP {first[other]}"
            order = (first["attention"], first[other], *(_order(first["kind"][n]) for n in WORDS))
            parted.append((order, ", ".join([first["attention"], place, *words]), sorted(chosen, key=lambda r: r[across])))
    return [(name, runs) for _, name, runs in sorted(parted, key=lambda line: line[0])]


def differences(rows: Sequence[Row]) -> list[str]:
    """A line for the reader on what parts the runs, and one on runs of the same kind in the same place."""
    found = []
    for attention in dict.fromkeys(r["attention"] for r in rows):
        own = [r for r in rows if r["attention"] == attention]
        names = [n for n in _differ(own) if n not in FOLLOWS]
        if names:
            said = "; ".join(f"{n} {', '.join(sorted({str(_shown(r['kind'][n])) for r in own}))}" for n in names)
            found.append(f"{attention} runs differ in {said}: each is a series of its own, compared with none of the others")
    places: dict[tuple[Any, ...], list[str]] = {}
    for r in rows:
        place = (r["attention"], r["seq_length"], r["context_parallel"], *r["kind"].values())
        places.setdefault(place, []).append(str(r["folder"]))
    same = [runs for runs in places.values() if len(runs) > 1]
    return found + [f"{', '.join(runs)} are runs of the same: pictures and efficiency go by their median" for runs in same]


def _differ(rows: Sequence[Row]) -> list[str]:
    return [name for name in WORDS if len({row["kind"][name] for row in rows}) > 1]


def _clash(rows: Sequence[Row], across: str, name: str) -> bool:
    values: dict[Any, set[Any]] = {}
    for row in rows:
        values.setdefault(row[across], set()).add(row["kind"][name])
    return any(len(found) > 1 for found in values.values())


def _by(rows: Sequence[Row], names: Sequence[str]) -> list[list[Row]]:
    parts: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        parts.setdefault(tuple(row["kind"][name] for name in names), []).append(row)
    return list(parts.values())


def _shown(value: Any) -> Any:
    return "not given" if value is None else f"{value:g}" if isinstance(value, float) else value


def _order(value: Any) -> tuple[bool, bool, Any]:
    return (value is not None, isinstance(value, str), 0 if value is None else value)
