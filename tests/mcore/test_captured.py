"""What is captured while a run trains, by Megatron's own bookkeeping: a graph is here the stage in which it was captured."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.transformer import cuda_graphs
from megatron.core.transformer.cuda_graphs import CudaGraphManager, _CudaGraphRunner
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_lighthouse.mcore.command_line.stage import Schedule
from megatron_lighthouse.mcore.loop import captured, switch
from tests.mcore.test_spec import SETTINGS, transformer_config


class Layer(MegatronModule):  # type: ignore[misc]
    """Gives its input times the stage; what was captured, times that stage for ever."""

    stage = 1.0

    def __init__(self) -> None:
        config = transformer_config()
        super().__init__(config)
        config.cuda_graph_impl = "local"
        groups = SimpleNamespace(pp=mock.Mock(size=lambda: 1))
        self.cudagraph_manager = CudaGraphManager(config, pg_collection=groups)

    def forward(self, x: Tensor) -> Tensor:
        return x * Layer.stage

    def __call__(self, x: Tensor) -> Tensor:
        out = self.cudagraph_manager(self, (x,), {})
        return out[0] if isinstance(out, tuple) else out


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A machine whose graphs are the stage in which they were captured; what was captured."""
    made: list[str] = []

    def forward(runner: Any, args: Any, kwargs: Any, outputs: Any = None, clone_inputs: bool = True) -> None:
        made.append("forward")
        runner.fwd_graph = Layer.stage

    def backward(runner: Any) -> None:
        made.append("backward")

    def replay(runner: Any, first: bool, args: Any, kwargs: Any) -> Tensor:
        out: Tensor = args[0] * runner.fwd_graph
        return out

    monkeypatch.setattr(_CudaGraphRunner, "create_fwd_graph", forward)
    monkeypatch.setattr(_CudaGraphRunner, "create_bwd_graph", backward)
    monkeypatch.setattr(_CudaGraphRunner, "replay_graph_capture", replay)
    tracker = SimpleNamespace(is_inference_rng_tracker=True)
    monkeypatch.setattr(cuda_graphs, "get_cuda_rng_tracker", lambda: tracker)
    monkeypatch.setattr(CudaGraphManager, "global_mempool", "the first pool")
    for name in ("synchronize", "set_stream", "Stream", "Event", "default_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    held = {"allocated_bytes.all.current": 1, "reserved_bytes.all.current": 2}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: held)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 1)
    yield made
    cuda_graphs.delete_cuda_graphs()


def step(layer: Layer, x: Tensor | None = None) -> float:
    """An iteration of Megatron's schedule: forward, backward, and at its end what there is to capture."""
    x = torch.ones(2, requires_grad=True) if x is None else x
    out = layer(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    for runner in layer.cudagraph_manager.cudagraph_runners:
        runner.status = cuda_graphs._GraphStatus.FWD_READY  # as the backward of a replay leaves it
    captured.of_layers(cuda_graphs.create_cudagraphs)
    assert torch.equal(out, grad * x)
    return float(out[0].detach())


def test_at_a_switch_layers_are_captured_again(stand_in: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(captured, "say_once", said.append)
    monkeypatch.setattr(Layer, "stage", 1.0)
    layer = Layer()
    assert [step(layer) for _ in range(3)] == [1.0] * 3
    assert stand_in == ["forward", "backward"]
    assert len(said) == 1
    assert said[0].startswith("CUDA graphs of layers were captured in ")
    monkeypatch.setattr(Layer, "stage", 2.0)
    assert step(layer) == 1.0, "a graph repeats what it was: without this the rest would say nothing"
    with mock.patch.object(torch.cuda, "set_stream") as stream:
        captured.forget([layer])
        stream.assert_called_once_with(torch.cuda.Stream.return_value)  # type: ignore[attr-defined]
    assert [step(layer) for _ in range(3)] == [2.0] * 3
    assert stand_in == ["forward", "backward"] * 2
    assert layer.cudagraph_manager.cudagraph_runners[0].mempool is torch.cuda.graph_pool_handle.return_value  # type: ignore[attr-defined]
    assert len(said) == 2


def test_what_lives_on_is_counted_anew_at_a_switch(stand_in: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the rotary angles that Megatron caches: its capture asserts as many reads as are noted."""
    monkeypatch.setattr(captured, "say_once", lambda line: None)
    monkeypatch.setattr(Layer, "stage", 1.0)
    layer, kept = Layer(), torch.ones(2, requires_grad=True)
    for _ in range(2):
        step(layer, kept)
        assert kept.cg_buffer_metadata.input_use_count == 1  # type: ignore[attr-defined]
        captured.forget([layer])


def test_an_evaluation_repeats_what_trains(stand_in: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of before a capture nothing is noted, and after it nothing is captured; training goes on."""
    monkeypatch.setattr(captured, "say_once", lambda line: None)
    layer = Layer()

    def evaluate() -> float:
        layer.eval()
        with torch.no_grad():
            out = layer(torch.ones(2))
        captured.of_layers(cuda_graphs.create_cudagraphs)  # at the end of its schedule too
        layer.train()
        return float(out[0])

    monkeypatch.setattr(Layer, "stage", 1.0)
    assert evaluate() == 1.0
    assert stand_in == []
    assert step(layer) == 1.0
    monkeypatch.setattr(Layer, "stage", 3.0)
    assert [evaluate(), evaluate(), step(layer), evaluate()] == [1.0] * 4
    assert stand_in == ["forward", "backward"]
    captured.forget([layer])
    assert [step(layer), evaluate(), step(layer)] == [3.0] * 3
    assert stand_in == ["forward", "backward"] * 2


def test_nothing_is_forgotten_before_a_capture(stand_in: list[str]) -> None:
    """As where a job begins after the switch."""
    layer = Layer()
    before = layer.cudagraph_manager.cudagraph_runners
    captured.forget([layer])
    assert layer.cudagraph_manager.cudagraph_runners is before
    assert not torch.cuda.synchronize.called  # type: ignore[attr-defined]


class Iterations(FullCudaGraphWrapper):  # type: ignore[misc]
    """Whole iterations: eager ones give the stage, captured ones that of their capture."""

    def __init__(self) -> None:
        self.cuda_graph_warmup_steps = 1

    def __call__(self, forward_only: bool, model: list[Any]) -> float:
        kind = "validation" if forward_only else "training"
        if self.curr_iter(kind) == self.cuda_graph_warmup_steps:
            FullCudaGraphWrapper.cuda_graph[kind] = Layer.stage
        self.next_iter(kind)
        graph = FullCudaGraphWrapper.cuda_graph[kind]
        return Layer.stage if graph is None else graph


def test_at_a_switch_whole_iterations_are_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(captured, "say_once", said.append)
    monkeypatch.setattr(torch.cuda, "synchronize", mock.Mock())
    monkeypatch.setattr(Layer, "stage", 1.0)
    graph = Iterations()

    def run(forward_only: bool = False) -> float:
        found: float = captured.of_iteration(Iterations.__call__, graph, forward_only=forward_only, model=[])
        return found

    try:
        assert [run() for _ in range(3)] == [1.0] * 3
        assert [run(forward_only=True) for _ in range(2)] == [1.0] * 2
        assert [line.partition(" were")[0] for line in said] == [
            f"CUDA graphs of iterations of {kind}" for kind in ("training", "validation")
        ]
        monkeypatch.setattr(Layer, "stage", 2.0)
        assert [run(), run(forward_only=True)] == [1.0, 1.0]
        pools = iter(["one", "another"])
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
        assert [captured.pool(str, True), captured.pool(str, True), captured.pool(str, False)] == ["one", "one", "False"]
        captured.forget([])
        assert captured.pool(str, True) == "another", "torch captures into no pool whose graphs are gone"
        assert [run() for _ in range(3)] == [2.0] * 3
        assert [run(forward_only=True) for _ in range(2)] == [2.0] * 2
        assert len(said) == 4
    finally:
        captured.forget([])


class Weights:
    """Megatron's notes of weights that are gathered while the forward pass begins (`_ParamAndGradBucketGroup`)."""

    use_forward_hook, overlap_param_gather_with_optimizer_step = True, False

    def __init__(self) -> None:
        self.dispatched, self.gathered = False, list[int]()

    def reset_param_sync_dispatch_state(self) -> None:
        self.dispatched = False

    def evaluate(self) -> None:
        """Megatron gathers them before, and notes it (`disable_forward_pre_hook`)."""
        self.dispatched = True

    def iterate(self, iteration: int) -> None:
        """A forward pass gathers what is not; the end of an iteration takes the note back (`finish_grad_sync`)."""
        if not self.dispatched:
            self.gathered.append(iteration)
        self.dispatched = False


@pytest.mark.parametrize("evaluated", [1, 2, 3])
def test_what_is_captured_gathers_the_weights(evaluated: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an evaluation or a checkpoint too, which gathered them: else no replay would, and ranks would drift apart."""
    monkeypatch.setattr(captured, "say_once", lambda line: None)
    monkeypatch.setattr(torch.cuda, "synchronize", mock.Mock())
    weights, graph = Weights(), Iterations()
    graph.cuda_graph_warmup_steps = 2

    def call(graph: Iterations, *, forward_only: bool, model: list[Any]) -> float:
        model[0].iterate(graph.curr_iter("training"))
        return Iterations.__call__(graph, forward_only=forward_only, model=model)

    try:
        for iteration in range(3):
            if iteration == evaluated - 1:
                weights.evaluate()
            captured.of_iteration(call, graph, forward_only=False, model=[weights])
        assert graph.cuda_graph["training"] is not None
        assert 2 in weights.gathered, "what is repeated"
        assert (evaluated - 1 in weights.gathered) == (evaluated == 3), "an eager iteration goes by the note"
    finally:
        FullCudaGraphWrapper.reset_cuda_graph(graph)


def test_the_switch_forgets_before_the_first_iteration_of_other_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, forgotten = iter([0, 0, 5, 5, 5]), list[Any]()
    monkeypatch.setattr(switch, "_tell", lambda settings, before: next(dense))
    monkeypatch.setattr(captured, "forget", forgotten.append)
    follows = switch.Switch(SETTINGS)

    def train_step(forward: Any, data: Any, model: Any, *rest: Any, iteration: int) -> tuple[int, int]:
        return iteration, len(forgotten)

    found = [follows.train_step(train_step, None, None, "model", iteration=i) for i in range(5)]
    assert found == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 1)]
    assert forgotten == ["model"]
    assert Schedule(1).return_iters == 1  # of more than one, graphs are refused


class Graph:
    """In torch's place, which makes none without a GPU."""

    held = True

    def reset(self) -> None:
        self.held = False


def test_at_the_end_nothing_is_held_that_a_process_group_would_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, waited = [Graph(), Graph()], list[bool]()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    captured.end()  # without a GPU there is none
    assert all(graph.held for graph in graphs)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(all(graph.held for graph in graphs)))
    captured.end()
    assert waited == [True]
    assert not any(graph.held for graph in graphs)
