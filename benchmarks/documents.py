"""`python benchmarks/documents.py --out FOLDER`: one Lighthouse layer over packed documents on one GPU, beside dense attention.

Rows of 98,304 tokens, 8 heads of 128, bf16: as one document; with lengths as a corpus has them (`--lengths FILE`, one number a
line, in place of those drawn here: mean 8K, some of 64K); with means of 4K, 16K and 64K; and 512 documents of 192 tokens. Of
each the time forward and with backward, and that of dense attention over the same documents in the same run, by each backend
that takes them: torch's `varlen_attn` ("dense fa2") where it is there, and a call a document ("dense sdpa"). A bar goes by the
fastest of them. Before that the layer over documents is held to each of them alone, and each dense backend in bf16 to float32,
with windows and sinks too.
Leaves documents.csv and documents.json, which say of each bar whether it is met, and beside what.

`--device cpu --tokens 2048` goes the whole way on a CPU, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from csv_tables import write_csv
from measure import median_ms, peak_gib
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.softmax.backends import FAMILIES
from megatron_lighthouse.softmax.documents import AttendDocuments, documents_attention
from megatron_lighthouse.softmax.rows import DOCUMENTS
from megatron_lighthouse.versions import environment

TOKENS, HEADS, GROUPS, DIM = 98304, 8, 8, 128
COPIES = 2
"""Sets of inputs, taken in turn."""
SHORT = 192
BARS = {
    "corpus": ("one document", "fwd+bwd", 1.0),
    f"of {SHORT} tokens": ("dense", "fwd+bwd", 1 / 1.15),
    "mean 4K": ("dense", "fwd+bwd", 1.0),
    "mean 16K": ("dense", "fwd+bwd", 4.0),
    "mean 64K": ("dense", "fwd+bwd", 12.0),
}
"""Of each mix: what it is held to, in which direction, and how many times as fast it is to be."""
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def drawn(mean: int, tokens: int, longest: int, seed: int = 1) -> list[int]:
    """Lengths that fill a row: log-normal with the spread of web text and code (sigma 1.2), and a last one that is cut."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        length = int(mean * (1.2 * torch.randn(1, generator=generator) - 0.72).exp())
        lengths.append(min(max(1, length), longest, tokens - sum(lengths)))
    return lengths


def mixes(tokens: int, given: list[int]) -> dict[str, list[int]]:
    """Lengths of each mix. Sizes follow the row, so that a small one can be tried."""
    k = max(1, tokens // 96)  # 1024 in a whole row
    cut: list[int] = []
    for length in given:
        if sum(cut) < tokens:
            cut.append(min(length, tokens - sum(cut)))
    found = {
        "one document": [tokens],
        "corpus": cut or drawn(8 * k, tokens, 64 * k),
        **{f"mean {n}K": drawn(n * k, tokens, 96 * k, seed=n) for n in (4, 16, 64)},
        f"of {SHORT} tokens": [SHORT] * (tokens // SHORT),
    }
    return {name: [*lengths, *[rest for rest in (tokens - sum(lengths),) if rest]] for name, lengths in found.items()}


def documents_of(lengths: list[int], device: str) -> Documents:
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return Documents.of(bounds, sum(lengths))


def inputs_of(tokens: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v with gradients: [t, 1, H, D] and [t, 1, G, D]."""
    heads = (HEADS, GROUPS, GROUPS)
    return [torch.randn(tokens, 1, n, DIM, device=device, dtype=dtype).requires_grad_() for n in heads]


def backward_too(layer: Layer, grad: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    out = layer(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def largest_error(config: LighthouseConfig, lengths: list[int], inputs: list[Tensor]) -> float:
    """Of output and gradients, between a row of documents and each of them in a row of its own."""
    documents, device = documents_of(lengths, str(inputs[0].device)), str(inputs[0].device)
    grad = torch.randn_like(inputs[0])
    together = backward_too(partial(lighthouse_attention, config=config, cu_seqlens=documents), grad, inputs)
    start, worst = 0, 0.0
    for length in lengths:
        here = slice(start, start + length)
        own = [x[here].detach().requires_grad_() for x in inputs]
        layer = partial(lighthouse_attention, config=config, cu_seqlens=documents_of([length], device))
        for a, b in zip(together, backward_too(layer, grad[here], own), strict=True):
            worst = max(worst, float((a[here] - b).abs().max()))
        start += length
    return worst


def layers(config: LighthouseConfig, documents: Documents, inputs: list[Tensor]) -> dict[str, Layer]:
    """Ours, and dense attention."""
    ours: Layer = partial(lighthouse_attention, config=config, cu_seqlens=documents)
    return {"lighthouse": ours, **dense_layers(documents, inputs)}


def dense_layers(documents: Documents, inputs: list[Tensor]) -> dict[str, Layer]:
    """By each backend that takes documents."""
    found: dict[str, Layer] = {}
    for name in FAMILIES[DOCUMENTS]:
        try:
            attend = documents_attention(name, inputs[0], inputs[1])
        except ValueError as error:
            print(f"dense by {name} is left out: {error}", flush=True)
            continue
        found[f"dense {name}"] = partial(_dense, attend, documents)
    return found


def dense_errors(lengths: list[int], device: str, dtype: torch.dtype) -> dict[str, float]:
    """Of each dense backend in `dtype`: how far output and gradients are from a call a document in float32, relative norms."""
    documents, wide = documents_of(lengths, device), inputs_of(sum(lengths), device, torch.float32)
    inputs, grad = [x.detach().to(dtype).requires_grad_() for x in wide], torch.randn_like(wide[0])
    exact = backward_too(partial(_dense, documents_attention("sdpa", wide[0], wide[1]), documents), grad, wide)
    return {
        what: max(
            float((a.float() - b).norm() / b.norm())
            for a, b in zip(backward_too(layer, grad.to(dtype), inputs), exact, strict=True)
        )
        for what, layer in dense_layers(documents, inputs).items()
    }


def windowed_error(lengths: list[int], device: str, dtype: torch.dtype) -> float:
    """The same of a window of 100 tokens with sinks, by the backend that 'auto' takes in `dtype`, beside plain PyTorch."""
    documents, wide = documents_of(lengths, device), inputs_of(sum(lengths), device, torch.float32)
    inputs, grad = [x.detach().to(dtype).requires_grad_() for x in wide], torch.randn_like(wide[0])
    sinks, found = torch.linspace(-1, 2, HEADS, device=device), []
    for name, rows in (("auto", inputs), ("sdpa", wide)):
        attend = documents_attention(name, rows[0], rows[1], window=100, sinks=True)
        layer = partial(_with_sinks, attend, documents, sinks)
        found.append(backward_too(layer, grad.to(rows[0].dtype), rows))
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(*found, strict=True))


def _with_sinks(
    attend: Callable[..., Tensor], documents: Documents, sinks: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    return attend(query, key, value, documents, sinks)


def _dense(attend: AttendDocuments, documents: Documents, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query, key, value, documents)


def time_mix(name: str, lengths: list[int], config: LighthouseConfig, device: str) -> list[dict[str, Any]]:
    """Milliseconds of each; none on a CPU, where each is run once."""
    tokens, dtype = sum(lengths), torch.bfloat16 if device == "cuda" else torch.float32
    documents, sets = documents_of(lengths, device), [inputs_of(tokens, device, dtype) for _ in range(COPIES)]
    grad, rows = torch.randn_like(sets[0][0]), []
    for what, layer in layers(config, documents, sets[0]).items():
        calls: dict[str, list[Callable[[], object]]] = {
            "fwd": [partial(layer, *(x.detach() for x in inputs)) for inputs in sets],
            "fwd+bwd": [partial(backward_too, layer, grad, inputs) for inputs in sets],
        }
        for direction, both in calls.items():
            row = {"mix": name, "documents": len(lengths), "longest": max(lengths), "what": what, "direction": direction}
            try:
                if device == "cuda":
                    row |= {"ms": round(median_ms(both), 3), "peak_gib": round(peak_gib(both[0]), 3)}
                else:
                    both[0]()
            except RuntimeError as error:  # one that fails is a result, and the others go on
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            rows.append(row)
            print(row, flush=True)
    return rows


def bars(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many times as fast each mix is as what it is held to, beside how many it is to be."""

    def fastest(mix: str, what: str, direction: str) -> tuple[float, str]:
        found = [row for row in rows if row["mix"] == mix and row["direction"] == direction and what in row["what"]]
        return min(((row["ms"], row["what"]) for row in found if "ms" in row), default=(math.nan, f"{what}, which failed"))

    said: dict[str, Any] = {}
    for mix, (other, direction, least) in BARS.items():
        own, _ = fastest(mix, "lighthouse", direction)
        alone = other == "one document"
        base, beside = fastest(other, "lighthouse", direction) if alone else fastest(mix, other, direction)
        of = f"{beside}, {other}" if alone else beside
        said[mix] = {"beside": of, "times as fast": round(base / own, 3), "bar": round(least, 3), "met": base >= least * own}
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "documents")
    parser.add_argument(
        "--lengths", type=Path, help="of a corpus' documents in tokens, one a line, in the order in which they come"
    )
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument(
        "--whole-below", type=int, default=256, help="documents of fewer tokens go in whole; default: %(default)s"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    config = LighthouseConfig.for_length(TOKENS, whole_below=options.whole_below)
    given = [int(line) for line in options.lengths.read_text().split()] if options.lengths else []
    short = [700, 1, 64, 5120, 333]  # the longest has a call of its own, of cuDNN's
    error = largest_error(config, short, inputs_of(sum(short), options.device, torch.float32))
    print(f"a row of documents and each alone differ by {error:.1e} at most, in fp32", flush=True)
    how = (short, options.device, torch.bfloat16 if options.device == "cuda" else torch.float32)
    errors = {**dense_errors(*how), "windows and sinks": windowed_error(*how)}
    print(f"dense attention is off by {errors} of its norm at most", flush=True)
    wrong = [what for what, found in errors.items() if not found < 0.01]
    rows: list[dict[str, Any]] = []
    for name, lengths in mixes(options.tokens, given).items():
        rows += time_mix(name, lengths, config, options.device)
        write_csv(options.out / "documents.csv", rows)
    met = bars(rows) if options.device == "cuda" else None
    summary = {"largest error": error, "dense errors": errors, "bars": met, **environment()}
    print(json.dumps(summary["bars"], indent=2), flush=True)
    (options.out / "documents.json").write_text(json.dumps(summary, indent=2) + "\n")
    if wrong or any("failed" in row for row in rows):
        failed = {f"{row['what']}, {row['mix']}" for row in rows if "failed" in row}
        raise SystemExit(f"failed: {'; '.join(sorted(failed))}; wrong over documents: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
