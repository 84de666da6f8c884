"""Wall with RoPE, whose pairs of channels share gates: a layer is its formula of relative positions, and layouts agree."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_lighthouse import lighthouse_attention
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from megatron_lighthouse.wall.config import WallConfig
from megatron_lighthouse.wall.cut import Step
from tests.mcore.harness import Run, refused, run, some_slow
from tests.mcore.test_checkpoints import save_interval
from tests.mcore.test_rotary import ROPES, built, raw_and_given
from tests.mcore.test_spec import local_spec, transformer_config
from tests.mcore.test_wall import ANEW, LAYOUTS, LOGGED, NONE, WHOLE, from_saved, half_lives, settings
from tests.tolerances import assert_close

N, DIM, HEADS, GROUPS = 64, 16, 4, 2
KINDS = ("all channels", "a half", "neighbours", "a quarter, neighbours", "every second layer without")


def model_of(kind: str, own: LighthouseSettings) -> Any:
    """Two layers in float64."""
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_lighthouse.mcore.attention.layer_specs import layer_spec

    of_model, of_layers = ROPES[kind]
    config = transformer_config(num_layers=2, kv_channels=DIM, init_method_std=0.3, transformer_impl="local", **of_layers)
    given = {"position_embedding_type": "rope", "vocab_size": 64, "seq_length": N, **of_model}
    return built(GPTModelConfig(transformer=config, transformer_layer_spec=partial(layer_spec, settings=own), **given))


def pairs_of(kind: str) -> tuple[int, list[tuple[int, int]]]:
    """How many pairs RoPE turns, and which channels make them and the rest of a head's, which share gates likewise."""
    of_model, of_layers = ROPES[kind]
    turned = int(DIM * of_model.get("rotary_percent", 1.0)) // 2
    if of_layers.get("rotary_interleaved"):
        return turned, [(2 * i, 2 * i + 1) for i in range(DIM // 2)]
    rest = DIM // 2 - turned
    behind = [(2 * turned + i, 2 * turned + rest + i) for i in range(rest)]
    return turned, [(i, i + turned) for i in range(turned)] + behind


def formula(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, pairs: list[tuple[int, int]], speed: Tensor) -> Tensor:
    """Pairs as complex numbers: Re(q conj(k) e^{iω(i-j)}) e^{Σ g}, of q and k that were not rotated.

    Args:
        gate: [N, b, H, K/2].
        speed: ω, [K/2].
    """
    ratio, tokens = query.shape[2] // key.shape[2], len(query)
    first, second = zip(*pairs, strict=True)
    q, k = (torch.complex(x[..., first], x[..., second]) for x in (query, key.repeat_interleave(ratio, 2)))
    place = torch.arange(tokens, dtype=torch.float64)
    angle = (place.unsqueeze(1) - place).unsqueeze(-1) * speed
    sums, shown = gate.repeat_interleave(query.shape[2] // gate.shape[2], 2).cumsum(0), torch.ones(tokens, tokens).tril().bool()
    faded = torch.where(shown.view(tokens, tokens, 1, 1, 1), sums.unsqueeze(1) - sums, 0).exp()
    turn = torch.polar(torch.ones_like(angle), angle)
    logits = torch.einsum("ibhp,jbhp,ijp,ijbhp->bhij", q, k.conj(), turn, faded.to(q.dtype)).real / DIM**0.5
    weights = logits.masked_fill(~shown, -torch.inf).softmax(-1)
    return torch.einsum("bhij,jbhv->ibhv", weights, value.repeat_interleave(ratio, 2)).flatten(2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_a_layer_is_its_formula(kind: str, tied: bool, megatron: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of relative positions: what it sees is rotated, and faded by gates that are not."""
    monkeypatch.setattr(Step, "TOKENS", 24)
    torch.manual_seed(5)
    model, outputs = model_of(kind, settings(paired_gates=True, tied_gates=tied, gate_bias=2.0)), {}
    seen = raw_and_given(model)
    for layer in model.decoder.layers:
        core = layer.self_attention.core_attention
        core.register_forward_hook(lambda _, __, out, number=layer.layer_number: outputs.update({number: out}))
    model(torch.randint(64, (2, N)), torch.arange(N).expand(2, N), None)
    turned, pairs = pairs_of(kind)
    for layer in model.decoder.layers:
        query, key, both = seen[layer.layer_number][:3]
        heads = GROUPS if tied else HEADS
        assert layer.self_attention.linear_g.weight.shape[0] == heads * DIM // 2
        gate = logsigmoid(both[:, :, GROUPS:].flatten(2).unflatten(-1, (heads, DIM // 2)))
        without = (layer.config.no_rope_freq or [0, 0])[layer.layer_number - 1]
        speed = torch.zeros(DIM // 2, dtype=torch.float64)
        speed[:turned] = 0 if without else model.rotary_pos_emb.inv_freq
        expected = formula(query, key, both[:, :, :GROUPS], gate, pairs, speed)
        assert_close(outputs[layer.layer_number], expected, "ranks float64")


@pytest.mark.parametrize("kind", ["a half", "neighbours"])
def test_lighthouse_around_it_gives_rows_gates_of_channels(kind: str, megatron: None) -> None:
    """Of rotated queries and keys, as the library has it."""
    torch.manual_seed(5)
    config = LighthouseConfig(levels=3, pooling=2, budget=4, tile_budget=2, around="wall")
    model = model_of(kind, LighthouseSettings(config, 0, 1, rope="mean", around=WallConfig(paired_gates=True, gate_bias=2.0)))
    core, seen = model.decoder.layers[0].self_attention.core_attention, {}
    core.register_forward_hook(lambda _, given, out: seen.update(given=given, out=out.clone()))  # it is let go
    model(torch.randint(64, (2, N)), torch.arange(N).expand(2, N), None)
    query, key, both = seen["given"][:3]
    _, pairs = pairs_of(kind)
    logits = both[:, :, GROUPS:].flatten(2).unflatten(-1, (HEADS, DIM // 2))
    gate = torch.empty_like(query)
    for i, pair in enumerate(pairs):
        gate[..., pair] = logsigmoid(logits[..., i : i + 1])
    expected = lighthouse_attention(query, key, both[:, :, :GROUPS], config, streams=[gate])
    assert_close(seen["out"], expected.flatten(2), "float64")


PAIRED = ("--attention", "wall", "--wall-paired-gates", "--rotary-percent", "0.5", "--train-iters", "4")


def train(folder: Path, *options: str, ranks: int = 1) -> Run:
    return run(folder, *PAIRED, *WHOLE, *LOGGED, *options, ranks=ranks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four iterations in one process, the first of which is saved."""
    folder = tmp_path_factory.mktemp("rope")
    return train(folder, *save_interval(folder / "checkpoint", 1))


@pytest.mark.parametrize("name", some_slow(["tensor", "context", "heads", "recompute"], {"tensor", "heads", "recompute"}))
def test_a_layout_changes_nothing(name: str, tmp_path: Path, whole: Run) -> None:
    options, ranks = LAYOUTS[name]
    found = train(tmp_path, *options.split(), *from_saved(whole), ranks=ranks)
    assert list(found.losses) == [2, 3, 4]
    assert_close(list(found.losses.values()), [whole.losses[i] for i in (2, 3, 4)], "parallel loss")
    norms = [[one.gradient_norms[i] for i in (2, 3, 4)] for one in (found, whole)]
    assert_close(*norms, "parallel gradient norm")
    lives, expected = (half_lives(one, 4) for one in (found, whole))
    assert_close([lives[name] for name in expected], [*expected.values()], "parallel half-life")


def test_from_dense_with_rope_it_goes_on_as_it_was(tmp_path: Path) -> None:
    """With a large bias: then gates are trained."""
    saved = tmp_path / "saved"
    dense = ("--attention", "dense", *save_interval(saved / "checkpoint", 1))
    before = run(saved, *dense, "--exit-interval", "1", "--train-iters", "4")
    options = (*from_saved(before), ANEW, "--train-iters", "4")
    expected = run(tmp_path / "dense", "--attention", "dense", *options)
    found = run(tmp_path / "wall", "--attention", "wall", "--wall-paired-gates", "--wall-gate-bias", "20", *options)
    assert found.losses[2] == pytest.approx(expected.losses[2], abs=1e-5)


def test_gates_of_pairs_are_not_taken_for_those_of_groups(tmp_path: Path, whole: Run) -> None:
    """Two query heads for a key/value head make as many columns."""
    log = refused(tmp_path, "--attention", "wall", *NONE, "--wall-tied-gates", "--train-iters", "4", *WHOLE, *from_saved(whole))
    assert "the columns of linear_g in" in log
    assert "it was trained with --wall-paired-gates" in log
    assert "and this has --wall-tied-gates" in log


@pytest.mark.parametrize("around", [False, True], ids=["alone", "around"])
@pytest.mark.parametrize(
    ("paired", "kind", "says"),
    [
        (True, "rope", ""),
        (True, "yarn", ""),
        (False, "rope", "each channel has its own gate: use --wall-paired-gates, or --position-embedding-type none"),
        (True, "none", "--wall-paired-gates, which is for what turns pairs of channels: use rope or yarn, or leave it out"),
        (True, "mrope", "use rope or yarn, or leave it out"),
        (False, "learned_absolute", "the gates take their place: use --position-embedding-type none"),
    ],
)
def test_positions_and_pairs_go_together(around: bool, paired: bool, kind: str, says: str, megatron: None) -> None:
    found = _problems(kind, around, "mean", paired_gates=paired)
    assert says in found
    assert bool(says) == bool(found)


def _problems(kind: str, around: bool, rope: str, **changes: Any) -> str:
    from megatron_lighthouse.mcore.command_line.checks import run_problems

    own = settings(**changes)
    if around:
        config = LighthouseConfig(levels=3, pooling=2, budget=4, tile_budget=2, around="wall")
        own = LighthouseSettings(config, 1, 1, rope=rope, around=own.config)
    args = Namespace(seq_length=256, transformer_impl="local", load=None, position_embedding_type=kind)
    return "\n".join(run_problems(args, transformer_config(num_layers=4), own))


def test_pooled_rows_that_fade_are_not_turned(megatron: None) -> None:
    assert "--lighthouse-rope last turns pooled rows" in _problems("rope", True, "last", paired_gates=True)
    assert not _problems("none", True, "last")


def test_a_spec_must_say_what_is_rotated(megatron: None) -> None:
    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    with pytest.raises(ValueError, match=r"--wall-paired-gates needs to know what the model rotates .* or leave it out"):
        with_lighthouse(local_spec(), settings(paired_gates=True))


def test_a_spec_refuses_pooled_rows_that_are_turned(megatron: None) -> None:
    """Where no arguments say what the model's positions are."""
    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    config = LighthouseConfig(levels=3, pooling=2, budget=4, tile_budget=2, around="wall")
    own = LighthouseSettings(config, 1, 1, around=WallConfig(paired_gates=True))
    with pytest.raises(ValueError, match="--lighthouse-rope last turns pooled rows"):
        with_lighthouse(local_spec(), own, Rotary(torch.tensor([0.3])))


def test_an_odd_number_of_channels_is_refused(megatron: None) -> None:
    from megatron_lighthouse.mcore.command_line.checks import model_problems

    found = [*model_problems(transformer_config(kv_channels=7), settings(paired_gates=True), None)]
    assert found == ["--wall-paired-gates is for an even number of channels: use --kv-channels 8, not 7."]
    assert WallConfig().paired_gates is False
