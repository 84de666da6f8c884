"""`python benchmarks/document_host.py`: what a layer over packed documents costs the host of one rank, without a GPU.

The other ranks are not there: kernels are found as ever and their launch is nothing (`no_launches.py`), as are messages and the
inner attention. What is left is our Python, and torch's operations on few tokens. `--ranks`, `--rank` and `--mean` say which.
Prints the least microseconds of the thread, and how many operations (not views, nor new memory) and kernels there are;
`--profile` which functions the time goes to. On two GPUs `rings.py` times the host.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import no_launches
import rings
import torch
from launches import launches
from torch import Tensor

from megatron_lighthouse.context_parallel import merge, transfer
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.kernels.lighthouse import packed as kernels
from megatron_lighthouse.lighthouse.packed import layer, reference, tables
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.softmax import document_blocks, sharded_documents
from megatron_lighthouse.variant import Place

TOKENS, DIM, CALLS = 98304 // rings.SHORTER, 16, 200


class Received:
    """Tensors that nobody sent."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def open(self) -> list[Tensor]:
        return self.tensors

    def close(self) -> None:
        pass


class Alone(Exchange):
    """A rank, and new memory for all that comes."""

    def all_gather(self, x: Tensor, purpose: str) -> Tensor:
        return x.new_empty(self.size, *x.shape)

    def all_to_all(self, x: Tensor, purpose: str, to: Sequence[int] | None = None, by: Sequence[int] | None = None) -> Tensor:
        return x.new_empty(x.shape[0] if by is None else sum(by), *x.shape[1:])

    def swap(self, tensors: Sequence[Tensor], hop: int, shapes: Sequence[torch.Size], *_: Any) -> Received:
        return Received([x.new_empty(shape) for x, shape in zip(tensors, shapes, strict=True)])

    def copies(self, device: torch.device) -> Any:
        return True


def stand_ins() -> None:
    """For what needs a GPU."""
    named: Any = (merge, transfer, tables, document_blocks, sharded_documents, layer)
    for module in named[:3]:
        module.triton_takes = lambda x: True
    named[3].aten = SimpleNamespace(
        _flash_attention_forward=lambda q, *_, **__: (torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float)),
        _flash_attention_backward=lambda g, q, k, v, *_, **__: tuple(map(torch.empty_like, (q, k, v))),
    )
    named[4].within_documents = lambda name, q, k, scale, *_: document_blocks.AllAtOnce(scale)
    named[5].packed_steps_for = lambda *_: kernels


def calls(case: rings.Case, place: Layout) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Forward, and backward of what it gives."""
    documents, exchange = case.documents("cpu"), Alone(SimpleNamespace(), place)  # type: ignore[arg-type]
    assert documents is not None
    tokens = documents.tokens // place.size
    *inputs, grad = torch.randn(4, tokens, 1, rings.HEADS, DIM, dtype=torch.bfloat16).unbind()
    made = layer.build_packed(case.config, inputs[0], inputs[1], Place(exchange=exchange))
    packing = Packing.of(documents, case.config.rule)
    scores = torch.rand(2, 1, rings.HEADS, packing.coarse_length)
    selection, select = reference.select(scores, packing, True), kernels.select
    kernels.select = lambda *given: select(*given) and selection  # for the kernel leaves what memory held

    def forward() -> Any:
        leaves = [x.detach().requires_grad_() for x in inputs]
        return made.attended(*leaves, documents=documents).scatter(), leaves

    return forward, lambda found: torch.autograd.grad(found[0], found[1], grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--only-count", action="store_true", help="time nothing, and compile nothing")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--mean", default="documents, mean 8K", choices=rings.MEANS, help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stand_ins()
    given = rings.Case(options.mean, TOKENS), Layout(options.ranks, options.rank)
    if not options.only_count:
        no_launches.install()
        time_it(options.profile, *given)
    forward, backward = calls(*given)
    counted = launches(forward), launches(lambda: backward(forward()))
    for name, found in (("forward", counted[0]), ("backward", counted[1] - counted[0])):
        print(*(f"{count:4} {what}" for what, count in found.most_common()), f"{found.total():4} in all {name}", sep="\n")


def time_it(profiled: bool, case: rings.Case, place: Layout) -> None:
    """The least of many calls."""
    forward, backward = calls(case, place)
    backward(forward())  # makes tables, and compiles
    no_launches.as_if_initialized()
    torch.autograd.set_multithreading_enabled(False)
    spent = []
    for _ in range(CALLS):
        begin = time.thread_time()
        found = forward()
        middle = time.thread_time()
        backward(found)
        spent.append((middle - begin, time.thread_time() - middle))
    print("forward {:.0f} us, backward {:.0f} us".format(*(1e6 * min(times) for times in zip(*spent, strict=True))))
    if profiled:
        profile = cProfile.Profile()
        with profile:
            for _ in range(CALLS):
                backward(forward())
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
