"""Stage 2 in the same job: when layers become dense, that they are then dense layers, and that the run is that of two jobs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lighthouse.lighthouse import telemetry
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings, add_arguments, settings_from
from megatron_lighthouse.mcore.command_line.stage import Schedule
from megatron_lighthouse.plots import read_scalars
from tests.mcore.harness import Run, run
from tests.mcore.test_output import RECOMPUTE, loss
from tests.mcore.test_spec import SETTINGS, gpt, local_spec, transformer_config
from tests.tolerances import assert_close

ITER = 3


@pytest.mark.parametrize(
    ("schedule", "layers", "dense"),
    [
        (Schedule(3), 5, [0, 0, 0, 5, 5, 5]),
        (Schedule(1, 4), 4, [0, 1, 2, 3, 4, 4]),
        (Schedule(1, 3), 5, [0, 2, 4, 5, 5, 5]),
        (Schedule(1, 5), 2, [0, 1, 1, 2, 2, 2]),
        (Schedule(2, 3), 0, [0, 0, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_dense_layers_in_iterations_1_to_6(schedule: Schedule, layers: int, dense: list[int]) -> None:
    assert [schedule.dense_layers(iteration, layers) for iteration in range(1, 7)] == dense


def test_the_lowest_layers_go_first_and_none_returns() -> None:
    settings = LighthouseSettings(dense_first=1, dense_last=2, schedule=Schedule(10, 7))
    always = {1, 8, 9}
    before = always
    for iteration in range(30):
        dense = {layer for layer in range(1, 10) if settings.is_dense(layer, 9, iteration)}
        low = dense - {8, 9}
        assert low == set(range(1, len(low) + 1))
        assert before <= dense
        assert (dense == always) == (iteration <= 10)
        assert len(dense) == 9 or iteration < 17
        before = dense


def arguments(*words: str) -> Namespace:
    return add_arguments(ArgumentParser()).parse_args(words)


def test_arguments() -> None:
    assert settings_from(arguments()).schedule is None
    assert settings_from(arguments("--lighthouse-stage2-at", "7")).schedule == Schedule(7, 1)
    layers = ["--lighthouse-stage2-at", "7", "--lighthouse-return", "layers", "--lighthouse-return-iters", "4"]
    assert settings_from(arguments(*layers)).schedule == Schedule(7, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lighthouse-stage2-at 0", "--lighthouse-stage2-at 0 must be at least 1"),
        ("--lighthouse-return layers", "--lighthouse-return layers says how .* add --lighthouse-stage2-at ITER"),
        ("--lighthouse-return-iters 4", "--lighthouse-return-iters 4 says how .* add --lighthouse-stage2-at ITER"),
        ("--lighthouse-stage2-at 7 --lighthouse-return layers", "add --lighthouse-return-iters M"),
        ("--lighthouse-stage2-at 7 --lighthouse-return-iters 4", "leave it out, or use --lighthouse-return layers"),
        (
            "--lighthouse-stage2-at 7 --lighthouse-return layers --lighthouse-return-iters 0",
            "--lighthouse-return-iters 0 must be at least 1",
        ),
    ],
)
def test_arguments_that_are_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_from(arguments(*words.split()))


def test_the_progress_bar_says_dense_with_the_last_layer() -> None:
    from megatron_lighthouse.mcore.loop.progress import attention_in

    layers = "--attention lighthouse --lighthouse-stage2-at 7 --lighthouse-return layers --lighthouse-return-iters 4".split()
    assert [attention_in(arguments(*layers), iteration) for iteration in (7, 10, 11)] == ["lighthouse", "lighthouse", "dense"]
    assert [attention_in(arguments(*layers[:4]), iteration) for iteration in (7, 8)] == ["lighthouse", "dense"]


@pytest.mark.parametrize(
    ("schedule", "train_iters", "advice"),
    [
        (Schedule(9), 10, ""),
        (Schedule(10), 10, "use at most --lighthouse-stage2-at 9"),
        (Schedule(6, 4), 10, ""),
        (Schedule(7, 4), 10, "use at most --lighthouse-stage2-at 6"),
        (Schedule(2, 10), 10, "use at least --train-iters 12"),
        (Schedule(9), None, ""),
    ],
    ids=str,
)
def test_the_switch_must_come_before_the_end(schedule: Schedule, train_iters: int | None, advice: str) -> None:
    from megatron_lighthouse.mcore.command_line.checks import check_run

    samples = Namespace(train_samples=None, step_batch_size_schedule=None, global_batch_size=2)
    given = Namespace(seq_length=256, train_iters=train_iters, **vars(samples))
    settings = replace(SETTINGS, schedule=schedule)
    if not advice:
        check_run(given, transformer_config(), settings)
        return
    with pytest.raises(ValueError, match=advice):
        check_run(given, transformer_config(), settings)
    assert train_iters is not None
    for rest in (0, 1):  # a last batch that is not whole is no iteration
        given.train_iters, given.train_samples = None, 2 * train_iters + rest
        with pytest.raises(ValueError, match=f"of --train-iters {train_iters} in which"):
            check_run(given, transformer_config(), settings)


@pytest.mark.parametrize(
    ("skipped", "advice"),
    [([8], "7"), ([6, 7, 8], "5"), ([*range(1, 9), 10], "9"), ([7, 9], ""), ([], ""), (None, "")],
    ids=str,
)
def test_the_iteration_before_the_switch_is_trained(skipped: list[int] | None, advice: str, tmp_path: Path) -> None:
    from megatron_lighthouse.mcore.command_line.checks import check_run

    given = Namespace(seq_length=256, train_iters=20, iterations_to_skip=skipped, save="folder", load=str(tmp_path))
    settings = replace(SETTINGS, schedule=Schedule(8))
    if advice:
        with pytest.raises(ValueError, match=rf"--lighthouse-stage2-at 8 .* use --lighthouse-stage2-at {advice}\."):
            check_run(given, transformer_config(), settings)
        given.save = None
    check_run(given, transformer_config(), settings)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    given.save = "folder"
    check_run(given, transformer_config(), settings)


def test_what_does_not_go_with_it(megatron: None) -> None:
    from megatron.training.arguments import add_megatron_arguments

    from megatron_lighthouse.mcore.command_line.arguments import use_attention
    from megatron_lighthouse.mcore.command_line.checks import check

    config = transformer_config()
    given = arguments("--attention", "dense", "--lighthouse-stage2-at", "7")
    given.load, given.finetune, given.seq_length = None, False, 256
    with pytest.raises(ValueError, match=r"--lighthouse-stage2-at 7 .* leave it out, or use --attention lighthouse"):
        use_attention(given, Namespace(transformer_layer_spec=None, transformer=config))
    given.skip_train, given.lighthouse_telemetry_interval, given.rank = True, 0, 0  # --as evaluation of the launch scripts
    assert use_attention(given, Namespace(transformer_layer_spec=None, transformer=config)).transformer_layer_spec is None
    config.cuda_graph_impl = "local"
    check(config, replace(SETTINGS, schedule=Schedule(7)), None)
    with pytest.raises(ValueError, match=r"--cuda-graph-impl local would be captured anew .* use --lighthouse-return hard"):
        check(config, replace(SETTINGS, schedule=Schedule(7, 3)), None)
    config.cuda_graph_impl = "transformer_engine"
    check(config, SETTINGS, None)
    with pytest.raises(ValueError, match=r"--cuda-graph-impl transformer_engine captures once, .* leave one of them out"):
        check(config, replace(SETTINGS, schedule=Schedule(7)), None)
    known = {action.dest for action in add_megatron_arguments(ArgumentParser())._actions}
    assert {"train_samples", "step_batch_size_schedule", "cuda_graph_impl", "skip_train"} <= known


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"curr_iteration": 0, "iteration": 0}, 1),
        ({"curr_iteration": 7, "iteration": 5}, 8),
        ({"curr_iteration": 0, "iteration": 9}, 9),  # nothing left to train: Megatron only evaluates
        ({"iteration": 9, "skip_train": True}, 9),
    ],
    ids=str,
)
def test_the_iteration_of_the_training_loop(given: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.training

    from megatron_lighthouse.mcore.loop import switch

    with pytest.raises(ValueError, match="there is none: leave them out"):
        switch.iteration()
    monkeypatch.setattr(megatron.training, "get_args", lambda: Namespace(**{"skip_train": False, **given}))
    assert switch.iteration() == expected


def gradients(settings: LighthouseSettings | None, **changes: Any) -> list[Any]:
    """Loss, and its gradient in each parameter, of one small model."""
    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    torch.manual_seed(3)
    one = gpt(with_lighthouse(local_spec(), settings) if settings else local_spec(), transformer_config(**changes))
    value = loss(one)
    value.backward()
    return [value.detach(), *(p.grad for p in one.parameters())]


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_layers_are_those_of_a_model_with_fewer_lighthouse_layers(
    recompute: str, megatron: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six layers 2, 3 and 4 are Lighthouse, and become dense one by one: outputs and gradients to the bit."""
    from megatron_lighthouse.mcore.loop import switch

    scheduled, options = replace(SETTINGS, schedule=Schedule(10, 3)), RECOMPUTE[recompute]
    for iteration, same in ((10, SETTINGS), (11, replace(SETTINGS, dense_first=2)), (13, None)):
        monkeypatch.setattr(switch, "iteration", lambda now=iteration: now)
        assert all(map(torch.equal, gradients(scheduled, **options), gradients(same, **options)))


# whole runs: in one job, and in two. On two ranks that share each sequence, except where it says otherwise

STEPS = ["--train-iters", "5", "--eval-interval", "3", "--eval-iters", "1"]
SHARED = ["--context-parallel-size", "2", *STEPS]
SWITCH = ["--attention", "lighthouse", "--lighthouse-stage2-at", str(ITER)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stage")


@pytest.fixture(scope="module")
def in_one_job(folder: Path) -> Run:
    save = ["--save", str(folder / "checkpoint"), "--save-interval", "2", "--save-retain-interval", "2"]
    return run(folder / "one", *SHARED, *SWITCH, *save, "--lighthouse-telemetry-interval", "2", ranks=2)


def validation(folder: Path) -> list[tuple[int, float]]:
    return [(int(i), float(x)) for i, x in zip(*read_scalars(folder / "tensorboard")["lm loss validation"], strict=True)]


def test_one_job_is_the_same_run_as_two(folder: Path, in_one_job: Run) -> None:
    first = run(folder / "first", *SHARED, "--attention", "lighthouse", "--exit-interval", str(ITER), ranks=2)
    load = ["--load", str(folder / "checkpoint"), "--ckpt-step", str(ITER)]
    (folder / "map-3.png").touch()
    picture = ["--lighthouse-selection-map", str(folder / "map-{layer}.png"), "--lighthouse-telemetry-layers", "2", "3"]
    second = run(folder / "second", *SHARED, "--attention", "dense", *load, *picture, ranks=2)
    assert second.log.count(f"{folder / 'map-2.png'} is not drawn: layer 2 selected nothing here.") == 1
    assert second.log.count(f"{folder / 'map-3.png'} stays as an earlier job drew it: layer 3 selected nothing here.") == 1
    assert list(first.losses) == [1, 2, 3]
    assert {**first.losses, **second.losses} == in_one_job.losses
    assert {**first.gradient_norms, **second.gradient_norms} == in_one_job.gradient_norms
    assert [*validation(folder / "first"), *validation(folder / "second")] == validation(folder / "one")
    assert len(validation(folder / "one")) == 2


def test_the_checkpoint_before_the_switch(folder: Path, in_one_job: Run) -> None:
    saved = folder / "checkpoint"
    assert sorted(f.name for f in saved.glob("iter_*")) == [f"iter_{i:07}" for i in (2, ITER, 4, 5)]
    assert (saved / f"iter_{ITER:07}" / "metadata.json").exists()
    assert in_one_job.log.count(f"saving checkpoint at iteration {ITER:7}") == 1


def test_what_the_run_says(folder: Path, in_one_job: Run) -> None:
    assert in_one_job.log.count("Lighthouse layers are dense") == 1
    assert "dense 256 tokens: 100%" in in_one_job.log  # the progress bar
    assert f"iteration {ITER + 1}: 2 of 2 Lighthouse layers are dense (--lighthouse-stage2-at {ITER})" in in_one_job.log
    steps, layers = read_scalars(folder / "one" / "tensorboard")["lighthouse/layers"]
    assert dict(zip(steps, layers, strict=True)) == {1: 2, 2: 2, 3: 2, 4: 0, 5: 0}


def test_telemetry_of_layers_while_they_select(folder: Path, in_one_job: Run) -> None:
    """In iteration 2 and not in 4, of a run whose losses are those of runs without it."""
    scalars = read_scalars(folder / "one" / "tensorboard")
    logged = {name: values for name, values in scalars.items() if "/layer-" in name}
    what = [name.split("/") for name in telemetry.measure_names(3)]
    assert set(logged) == {f"lighthouse/{a}/layer-{layer}/{b}" for layer in (2, 3) for a, b in what}
    assert {tuple(steps) for steps, _ in logged.values()} == {(2,)}
    found = {name: values[0] for name, (_, values) in logged.items()}
    assert [found[f"lighthouse/entries/layer-3/level-{level}"] for level in range(3)] == [32, 32, 16]
    assert [found[f"lighthouse/coverage/layer-3/level-{level}"] for level in range(3)] == [32 / 256, 128 / 256, 1]
    assert all(0 < found[f"lighthouse/later-tokens/layer-{layer}/cut-25"] < 1 for layer in (2, 3))
    assert found["lighthouse/gap/layer-2/mean"] != found["lighthouse/gap/layer-3/mean"]


def test_resumed_before_the_switch_at_another_layout(folder: Path, in_one_job: Run) -> None:
    """Two pipeline stages, which must switch in the same iteration."""
    layout = ["--pipeline-model-parallel-size", "2", "--load", str(folder / "checkpoint"), "--ckpt-step", "2"]
    resumed = run(folder / "resumed", *STEPS, *SWITCH, *layout, ranks=2).losses
    assert list(resumed) == [3, 4, 5]
    assert_close(list(resumed.values()), [in_one_job.losses[i] for i in resumed], "parallel loss")
