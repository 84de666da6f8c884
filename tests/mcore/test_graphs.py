"""CUDA graphs: where a run takes them, what is refused, and the losses of whole iterations."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

import pytest
import torch
from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

from megatron_lighthouse.mcore.command_line import before, flags, graph_modules, graphs, optimizer_graph, run_options
from megatron_lighthouse.mcore.command_line.entry import with_all_arguments
from megatron_lighthouse.mcore.loop import finite
from megatron_lighthouse.recipe.presets import preset_for
from tests.mcore.test_checks import LOCAL_RANKS
from tests.mcore.test_selection_log import arguments
from tests.mcore.test_spec import transformer_config

RUN = """
    --num-layers 30 --hidden-size 1024 --num-attention-heads 8 --seq-length 32768 --max-position-embeddings 32768
    --micro-batch-size 1 --global-batch-size 1 --train-iters 9 --lr 1e-4 --eval-iters 0 --attention-dropout 0 --hidden-dropout 0
    --position-embedding-type rope --attention lighthouse --transformer-impl transformer_engine
"""


def parsed(words: str) -> Namespace:
    return flags.parse((RUN + words).split(), with_all_arguments, strict=False)[0]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(graphs, "say_once", lines.append)
    return lines


def test_auto_takes_them_where_they_save_time(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_GRAPH_REGISTER", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert graphs.taken(parsed("--graphs off"), gpu=True) == []
    assert not said
    assert graphs.taken(parsed(""), gpu=True) == []
    assert "--graphs auto turns them on" in said.pop()
    assert "NCCL_GRAPH_REGISTER" not in os.environ
    assert graphs.taken(parsed("--graphs auto"), gpu=True) == ["--cuda-graph-impl", "full_iteration", graphs.CHECK]
    assert "full_iteration is taken" in said[0]
    assert os.environ["NCCL_GRAPH_REGISTER"] == "0"
    assert graphs.taken(parsed("--graphs auto"), gpu=False) == []
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert graphs.taken(parsed("--graphs auto"), gpu=True) == []
    assert "not tried with evaluations over 4 ranks" in said[-1]
    assert graphs.taken(parsed("--graphs auto --cuda-graph-impl transformer_engine"), gpu=True) == []
    for words in ("--cuda-graph-impl full_iteration", "--cuda-graph-scope full_iteration"):
        assert graphs.taken(parsed(words), gpu=True) == [graphs.CHECK]


@pytest.mark.parametrize("words", ["--cuda-graph-impl local", "--enable-cuda-graph", "--cuda-graph-modules full_iteration"])
def test_graphs_need_a_gpu(words: str) -> None:
    (problem,) = run_options.without_gpus(parsed(f"{words} --distributed-backend gloo"))
    assert problem.startswith(f"--cuda-graph-impl {'full_iteration' if 'full' in words else 'local'} needs a GPU")


def test_make_train_on_one_gpu_takes_them(said: list[str]) -> None:
    words = [*preset_for(1).arguments, "--attention", "lighthouse", "--train-iters", "9", "--eval-interval", "9"]
    given = flags.parse(words, with_all_arguments, strict=False)[0]
    given.recompute_granularity = None  # what it is with Transformer Engine
    assert given.graphs == "auto"
    assert graphs.choice(given) == ("full_iteration", None)
    dense = flags.parse([*words, "--attention", "dense"], with_all_arguments, strict=False)[0]
    assert "--attention lighthouse alone" in str(graphs.remark(dense, 1))  # its stage 2
    assert "--graphs" not in preset_for(0).arguments


@pytest.mark.parametrize(
    ("words", "because"),
    [
        ("--seq-length 98304 --max-position-embeddings 98304", "98,304 tokens a rank"),
        ("--attention dense", "--attention lighthouse alone"),
        ("--lighthouse-around parallax", "around softmax"),
        ("--context-parallel-size 2", "--context-parallel-size 2"),
        ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size 2"),
        ("--recompute-granularity full", "--recompute-granularity full"),
        ("--use-checkpoint-args", "--use-checkpoint-args"),
        ("--dataloader-inter-document-masking", "each batch has other documents"),
        ("--lighthouse-telemetry-interval 5 --tensorboard-dir t", "cannot look into the graphs"),
        (
            "--lighthouse-stage2-at 5 --lighthouse-return layers --lighthouse-return-iters 2",
            "would be captured anew for each of",
        ),
        ("--mlp-tile-tokens 512", "not tried in a graph"),
        ("--fp16", "the loss scale that it captured"),
        ("--step-batch-size-schedule 0:8", "captures as many micro-batches as the first"),
        ("--cpu-offloading-num-layers 2", "not tried with --cpu-offloading-num-layers 2"),
        ("--fine-grained-activation-offloading --offload-modules core_attn", "--fine-grained-activation-offloading True"),
    ],
)
def test_why_they_are_left_off(words: str, because: str, said: list[str]) -> None:
    assert graphs.taken(parsed(f"{words} --graphs auto"), gpu=True) == []
    assert said[-1].startswith("--graphs auto: CUDA graphs are left off: ")
    assert because in said[-1]
    said.clear()
    assert graphs.taken(parsed(f"{words} --graphs off"), gpu=True) == []
    assert not said  # nobody asked, and nothing would be saved


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--graphs off --cuda-graph-impl local", "--graphs off with --cuda-graph-impl local"),
        ("--graphs off --enable-cuda-graph", "--graphs off with --cuda-graph-impl local"),
        ("--cuda-graph-impl local --recompute-granularity full", "--recompute-granularity full with --cuda-graph-impl local"),
        ("--cuda-graph-impl local --cpu-offloading-num-layers 2", "--cpu-offloading-num-layers with --cuda-graph-impl local"),
        ("--cuda-graph-impl local --fine-grained-activation-offloading", "use --cuda-graph-impl transformer_engine"),
        ("--cuda-graph-impl local --eval-iters 2 --eval-micro-batch-size 2", "use --eval-micro-batch-size 1"),
        ("--cuda-graph-impl full_iteration --step-batch-size-schedule 0:8", "--step-batch-size-schedule"),
        ("--cuda-graph-impl full_iteration --check-for-large-grads", "--check-for-large-grads with"),
        ("--cuda-graph-impl local --eval-iters 2 --hidden-dropout 0.1", "drop out in evaluations too: use --hidden-dropout 0,"),
        (
            "--cuda-graph-impl local --eval-iters 2 --hidden-dropout 0.1 --attention-dropout 0.2",
            "use --hidden-dropout 0 --attention-dropout 0,",
        ),
        ("--cuda-graph-impl full_iteration --fp16", "use --bf16, a constant --loss-scale"),
        ("--cuda-graph-impl local --save-dgrads-interval 5", "--save-dgrads-interval 5 with"),
        ("--cuda-graph-impl full_iteration --save-activations-interval 5", "it sees nothing: leave one of them out"),
        ("--cuda-graph-impl full_iteration --timing-log-level 1", "leave it out, or use --cuda-graph-impl local"),
        ("--cuda-graph-impl full_iteration --log-straggler", "--log-straggler True with"),
        ("--cuda-graph-scope full_iteration --timing-log-level 1", "--timing-log-level 1 with --cuda-graph-impl full"),
        ("--graphs off --cuda-graph-scope full_iteration", "--graphs off with --cuda-graph-impl full_iteration"),
        ("--cuda-graph-impl local --cuda-graph-modules attn nonsense", "--cuda-graph-modules nonsense is not known: use some"),
        ("--cuda-graph-impl local --cuda-graph-scope atn", "--cuda-graph-scope atn is not known: use some of attn, mlp"),
        ("--cuda-graph-impl local --cuda-graph-modules mamba", "captures Mamba layers alone, and there are none"),
        ("--cuda-graph-impl local --inference-cuda-graph-scope block", "scope block with --cuda-graph-impl local, which then"),
        ("--enable-cuda-graph --cuda-graph-scope full_iteration_inference", "captures no layer that trains: leave it out"),
    ],
)
def test_what_cannot_be_is_refused(words: str, message: str) -> None:
    (problem,) = graphs.problems(parsed(words))
    assert message in problem


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optimizer muon", "is for Adam, and --optimizer is muon: use --optimizer adam"),
        ("--weight-decay-incr-style cosine --start-weight-decay 0 --end-weight-decay 0.1", "the weight decay would stay"),
        ("--use-distributed-optimizer --save c", "use --no-save-optim, or leave --optimizer-cuda-graph out"),
        ("--log-num-zeros-in-grad", "--log-num-zeros-in-grad True, which a graph cannot hold"),
    ],
)
def test_what_an_optimizer_in_a_graph_does_not_go_with(words: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = parsed(f"{words} --optimizer-cuda-graph")
    (problem,) = optimizer_graph.problems(given)
    assert message in problem
    assert problem in run_options.problems(given)
    assert not [*optimizer_graph.problems(parsed(words))]
    assert not [*optimizer_graph.problems(parsed("--optimizer-cuda-graph"))]
    monkeypatch.setattr(optimizer_graph, "find_spec", lambda name: None)
    assert optimizer_graph.missing(given)
    assert not optimizer_graph.missing(parsed(words))
    monkeypatch.setattr(optimizer_graph, "find_spec", lambda name: name == "apex")
    assert not optimizer_graph.missing(given)


def test_what_can_be_is_not() -> None:
    for words in ("", "--graphs auto", "--cuda-graph-impl local --recompute-granularity selective"):
        assert not [*graphs.problems(parsed(words))]
    assert not [*graphs.problems(parsed("--cuda-graph-impl full_iteration --recompute-granularity full"))]
    assert not [*graphs.problems(parsed("--cuda-graph-impl local --timing-log-level 2 --hidden-dropout 0.1"))]  # no evaluation
    assert not [*graphs.problems(parsed("--cuda-graph-impl full_iteration --eval-iters 2 --hidden-dropout 0.1"))]
    assert not [*before.problems(parsed("--graphs auto --eval-interval 9"))]
    older = "--cuda-graph-impl local --cuda-graph-scope full_iteration"  # is what whole iterations were asked for by
    assert not [*graphs.problems(parsed(f"{older} --recompute-granularity full --eval-iters 2 --hidden-dropout 0.1"))]
    assert not [*graphs.problems(parsed("--cuda-graph-impl local --cuda-graph-modules attn mlp"))]
    assert not [*graphs.problems(parsed("--cuda-graph-impl local --cuda-graph-modules mamba --use-checkpoint-args"))]
    assert not [*graphs.problems(parsed("--cuda-graph-impl local --cuda-graph-scope full --inference-cuda-graph-scope layer"))]


@pytest.mark.usefixtures("megatron")
def test_the_modules_are_megatrons() -> None:
    from megatron.core.transformer.cuda_graph_config import CUDA_GRAPH_MODULES_DEPRECATIONS
    from megatron.core.transformer.enums import CudaGraphModule

    assert [*CudaGraphModule.__members__] == [*graph_modules.MODULES]
    assert {*CUDA_GRAPH_MODULES_DEPRECATIONS} == {graph_modules.ITERATION, graph_modules.INFERENCE}
    config = transformer_config()
    config.cuda_graph_modules = [CudaGraphModule.attn]
    assert graph_modules.names(config) == ["attn"]
    assert graphs.kind_of(config) == "none"


@pytest.mark.parametrize(
    ("words", "evaluates"),
    [
        ("--eval-interval 3", True),
        ("--eval-interval 10", True),  # at the end
        ("--eval-interval 10 --exit-interval 4", True),  # the last job's
        ("--eval-interval 10 --exit-interval 3", False),
        ("--eval-interval 9 --exit-interval 3", True),
        ("--eval-interval 4 --exit-interval 3 --start-eval-at-iter 8", True),
        ("--eval-interval 4 --exit-interval 3 --start-eval-at-iter 9", False),
        ("--eval-interval 3 --skip-train", False),  # then nothing is captured that trains
        ("--eval-interval 3 --eval-iters 0", False),
    ],
)
def test_dropout_goes_with_graphs_of_layers_where_nothing_is_evaluated(words: str, evaluates: bool) -> None:
    given = parsed(f"--cuda-graph-impl local --hidden-dropout 0.1 --eval-iters 2 --eval-micro-batch-size 2 {words}")
    assert len([*graphs.problems(given)]) == 2 * evaluates


@pytest.mark.parametrize("loss", [1.0, float("nan")])
def test_losses_of_a_captured_iteration_are_checked(loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Megatron's machine, as it does without graphs: an iteration that is not finite does not step, an evaluation ends."""
    found: list[bool] = []

    def validate(result: torch.Tensor, rejection_func: Any, **named: Any) -> None:
        found.append(bool(rejection_func(result)))

    machine = RerunStateMachine(mode=RerunMode.DISABLED)
    monkeypatch.setattr(machine, "validate_result", validate)
    monkeypatch.setattr(finite, "get_rerun_state_machine", lambda: machine)

    def replay(graph: object, **named: Any) -> list[dict[str, torch.Tensor]]:
        return [{"lm loss": torch.tensor([2.0, 1.0])}, {"lm loss": torch.tensor([loss, 1.0])}]

    assert len(finite.whole_iteration(replay, None, forward_only=False)) == 2
    assert found == [False, loss != loss]
    finite.whole_iteration(replay, None, forward_only=True)
    assert found == [False, loss != loss] * 2


def test_the_check_stays_where_megatron_wants_its_own_off() -> None:
    off = {"check_for_nan_in_loss_and_grad": False}
    assert finite.checks(Namespace(cuda_graph_impl="full_iteration", **off))
    assert not finite.checks(Namespace(cuda_graph_impl="none", **off))


@pytest.mark.usefixtures("megatron")
def test_which_graphs_can_hold_dense_attention_that_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lighthouse.mcore.command_line.arguments import use_attention

    config = transformer_config()
    for name, value in LOCAL_RANKS.items():
        setattr(config, name, value)
    given = arguments("--attention", "dense", seq_length=256, overlap_grad_reduce=True, overlap_param_gather=False)
    refused = [
        ("transformer_engine", r"--cuda-graph-impl transformer_engine is not tried .* use --cuda-graph-impl local"),
        ("full_iteration", r"full_iteration with --overlap-grad-reduce .* in a circle: use --cuda-graph-impl local"),
    ]
    for kind, message in refused:
        config.cuda_graph_impl = kind
        with pytest.raises(ValueError, match=message):
            use_attention(given, Namespace(transformer=config, transformer_layer_spec=None))
        with monkeypatch.context() as here:
            here.setenv("LIGHTHOUSE_COPY_ENGINE", "0")
            use_attention(given, Namespace(transformer=config, transformer_layer_spec=None))
    given.overlap_grad_reduce = False
    use_attention(given, Namespace(transformer=config, transformer_layer_spec=None))
    config.cuda_graph_impl, given.overlap_grad_reduce = "local", True
    use_attention(given, Namespace(transformer=config, transformer_layer_spec=None))
