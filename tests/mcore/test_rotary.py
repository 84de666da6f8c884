"""Rotary positions in Megatron: rows stand where Megatron would have rotated their raw mean to, whatever it rotates by."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.mcore.command_line import rope, stored
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from tests.mcore.test_spec import local_spec, transformer_config
from tests.tolerances import assert_close

N = 64
SETTINGS = LighthouseSettings(LighthouseConfig(budget=2, tile_budget=2), dense_first=0, dense_last=0)

# of the model, and of its transformer
ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all channels": ({}, {}),
    "a half": ({"rotary_percent": 0.5}, {}),
    "neighbours": ({}, {"rotary_interleaved": True}),
    "a quarter, neighbours": ({"rotary_percent": 0.25}, {"rotary_interleaved": True}),
    "another base": ({"rotary_base": 500}, {}),
    "interpolated": ({"seq_len_interpolation_factor": 3.0}, {}),
    "scaled as Llama 3": ({"rope_scaling": True, "rope_scaling_factor": 5.0, "rotary_base": 500_000}, {}),
    "every second layer without": ({}, {"no_rope_freq": [0, 1]}),
    "yarn": ({"position_embedding_type": "yarn"}, {}),
    "none": ({"position_embedding_type": "none"}, {}),
    "learnt": ({"position_embedding_type": "learned_absolute"}, {}),
}
YARN = {"rotary_scaling_factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}
YARN |= {"mscale": 1.0, "mscale_all_dim": 0.0, "correction_range_round_to_int": True}


def config_of(of_model: dict[str, Any], of_layers: dict[str, Any]) -> Any:
    """A GPTModelConfig whose layers are Lighthouse."""
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_lighthouse.mcore.attention.layer_specs import layer_spec

    config = transformer_config(num_layers=2, kv_channels=16, init_method_std=0.3, transformer_impl="local", **of_layers)
    if of_model.get("position_embedding_type") == "yarn":
        for name, value in YARN.items():
            setattr(config, f"yarn_{name}", value)
    given = {"position_embedding_type": "rope", "vocab_size": 64, "seq_length": N, **of_model}
    return GPTModelConfig(transformer=config, transformer_layer_spec=partial(layer_spec, settings=SETTINGS), **given)


def built(model_cfg: Any) -> Any:
    """Megatron's model in float64, its angles too."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder

    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = GPTModelBuilder(model_cfg).build_model(groups, pre_process=True, post_process=True).double()
    for name in ("inv_freq", "inv_freq_extra", "inv_freq_inter"):
        if (frequencies := getattr(getattr(model, "rotary_pos_emb", None), name, None)) is not None:
            setattr(model.rotary_pos_emb, name, frequencies.double())
    return model


def by_megatron(model: Any, layer: Any, x: Tensor) -> Tensor:
    """x [N, b, heads, channels] rotated as the layer's attention does it, at its positions."""
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    without = layer.config.no_rope_freq and layer.config.no_rope_freq[layer.layer_number - 1]
    if without or model.position_embedding_type not in ("rope", "yarn"):
        return x
    angles = model.rotary_pos_emb(N)
    angles = angles[0] if isinstance(angles, tuple) else angles
    return apply_rotary_pos_emb(x, angles, layer.config, mscale=layer.self_attention._yarn_concentration_factor)


def raw_and_given(model: Any) -> dict[int, list[Tensor]]:
    """By layer, once the model has been called: q, k and v as they are projected, and as core attention gets them."""
    seen: dict[int, list[Tensor]] = {layer.layer_number: [] for layer in model.decoder.layers}

    def watch(attention: Any, kept: list[Tensor]) -> None:
        project = attention.get_query_key_value_tensors

        def projected(*given: Any, **how: Any) -> Any:
            kept.extend(project(*given, **how))
            return tuple(kept)

        attention.get_query_key_value_tensors = projected
        attention.core_attention.register_forward_pre_hook(lambda _, given: kept.extend(given[:3]))

    for layer in model.decoder.layers:
        watch(layer.self_attention, seen[layer.layer_number])
    return seen


@pytest.mark.parametrize("name", ROPES)
def test_rows_are_the_raw_mean_rotated_by_megatron_at_the_last_token(name: str, megatron: None) -> None:
    torch.manual_seed(5)
    model = built(config_of(*ROPES[name]))
    seen = raw_and_given(model)
    tokens = torch.randint(64, (2, N))
    model(tokens, torch.arange(N).expand(2, N), None)
    for layer in model.decoder.layers:
        raw_q, raw_k, raw_v, *given = seen[layer.layer_number]
        core = layer.self_attention.core_attention
        assert_close(given[0], by_megatron(model, layer, raw_q), "float64")  # else the following would not be of this run
        ours = core._built(core.variant.build, core.variant_config, *given).layer
        selection, _ = ours.select(*given)
        rows = ours.steps.gather(*given, selection, None, ours.rotary)
        for x, gathered, turned in zip((raw_q, raw_k, raw_v), rows, (True, True, False), strict=True):
            assert_close(gathered, expected(model, layer, x, selection, turned), "turned rows")


def expected(model: Any, layer: Any, x: Tensor, selection: Any, turned: bool) -> Tensor:
    """The rows [S, b, heads, channels] of all entries: pooled raw, then rotated at the last token of their window."""
    entries, geometry = selection.indices, selection.geometry  # [b, groups, S]
    rows = x.new_zeros(entries.shape[2], *x.shape[1:])
    levels = []
    for level in range(geometry.levels):
        width = geometry.window(level)
        means = x.unflatten(0, (-1, width)).mean(1)
        if turned:
            at_ends = torch.zeros_like(x)
            at_ends[width - 1 :: width] = means
            means = by_megatron(model, layer, at_ends)[width - 1 :: width]
        levels.append(means)
    pyramid, ratio = torch.cat(levels), x.shape[2] // entries.shape[1]
    for b in range(x.shape[1]):
        for head in range(x.shape[2]):
            rows[:, b, head] = pyramid[entries[b, head // ratio], b, head]
    return rows


def test_turning_matters(megatron: None) -> None:
    """Else the test above could hold of rows that are not turned."""
    model = built(config_of({}, {}))
    core = model.decoder.layers[0].self_attention.core_attention
    assert isinstance(core.place.rotary, Rotary)
    given = [torch.randn(N, 1, heads, 16, dtype=torch.float64) for heads in (4, 2, 2)]
    ours = core._built(core.variant.build, core.variant_config, *given).layer
    selection, _ = ours.select(*given)
    turned, mean = (ours.steps.gather(*given, selection, None, how)[0] for how in (ours.rotary, None))
    assert (turned - mean).abs().max() > 0.1


def test_models_whose_rotation_is_not_known_are_refused(megatron: None) -> None:
    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse
    from megatron_lighthouse.mcore.attention.rotary import rotary_of
    from megatron_lighthouse.mcore.command_line.checks import check_run

    mrope = config_of({"position_embedding_type": "mrope"}, {"mrope_section": [2, 3, 3]})
    with pytest.raises(ValueError, match=r"mrope rotates by three positions .* use --lighthouse-rope mean"):
        rotary_of(mrope)
    args = Namespace(position_embedding_type="mrope", seq_length=N, load=None)
    with pytest.raises(ValueError, match=r"mrope rotates by three positions .* use --lighthouse-rope mean"):
        check_run(args, mrope.transformer, SETTINGS)
    check_run(args, mrope.transformer, replace(SETTINGS, rope=rope.MEAN))
    with pytest.raises(ValueError, match=r"a layer spec does not say: .* or use --lighthouse-rope mean"):
        with_lighthouse(local_spec(), SETTINGS)
    with_lighthouse(local_spec(), SETTINGS, rotary_of(config_of({}, {})))


def checkpoint(folder: Path, **arguments: Any) -> str:
    """A folder whose last checkpoint holds these arguments."""
    (folder / "iter_0000007").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    torch.save({"args": Namespace(**arguments)}, folder / "iter_0000007" / "common.pt")
    return str(folder)


OLD = {"attention": "lighthouse"}
"""Arguments of a run before --lighthouse-rope."""


@pytest.mark.parametrize(
    ("saved", "how", "asked", "taken", "says"),
    [
        (None, {}, "last", "last", None),
        (None, {}, "mean", "mean", None),
        ({"lighthouse_rope": "last"}, {}, "last", "last", None),
        ({"lighthouse_rope": "mean"}, {}, "mean", "mean", None),
        (
            {"lighthouse_rope": "mean"},
            {},
            "last",
            "mean",
            "rope mean is taken: .* with --finetune or --pretrained",
        ),
        (
            {"lighthouse_rope": "last"},
            {},
            "mean",
            "last",
            "rope last is taken: .* with --finetune or --pretrained",
        ),
        (OLD, {}, "last", "mean", "older than the argument"),
        (OLD, {}, "mean", "mean", None),
        ({**OLD, "lighthouse_rope": "mean"}, {"finetune": True}, "last", "last", "last is taken for a new run, and not mean"),
        ({"attention": "dense"}, {"finetune": True}, "last", "last", None),
        ({**OLD, "lighthouse_rope": "mean"}, {"ckpt_step": 3}, "last", "last", "does not say how it was trained"),
    ],
)
def test_a_checkpoint_goes_on_as_it_was_trained(
    saved: dict[str, Any] | None, how: dict[str, Any], asked: str, taken: str, says: str | None, tmp_path: Path
) -> None:
    load = checkpoint(tmp_path, **saved) if saved else str(tmp_path)
    args = Namespace(**{"load": load, "finetune": False, "ckpt_step": None, "pretrained_checkpoint": None, **how})
    found, said = rope.choice(args, asked, Path(load))
    assert found == taken
    assert (said is None) == (says is None)
    if says:
        assert re.search(says, str(said))
    assert rope.settled(args, replace(SETTINGS, rope=asked)).rope == args.lighthouse_rope == taken


def dcp(folder: Path, **arguments: Any) -> str:
    """As Megatron writes `torch_dcp` and `fsdp_dtensor`: each entry beside the tensors."""
    from torch.distributed.checkpoint import save

    state = {
        "model": {"weight": torch.zeros(2)},
        "iteration": 7,
        "opt_param_scheduler": {"max_lr": 0.5, "lr_decay_style": "linear"},
    }
    state |= {"args": Namespace(**arguments)} if arguments else {}
    folder.mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    save(state, checkpoint_id=folder / "iter_0000007", no_dist=True)
    return str(folder)


def of_ranks(folder: Path, name: str = "mp_rank_00_000", **arguments: Any) -> str:
    """As it writes `torch`: a file a rank."""
    (folder / "iter_0000007" / name).mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    state = {"model": {"weight": torch.zeros(2)}, "opt_param_scheduler": {"max_lr": 0.5, "lr_decay_style": "linear"}}
    state |= {"args": Namespace(**arguments)} if arguments else {}
    torch.save(state, folder / "iter_0000007" / name / "model_optim_rng.pt")
    return str(folder)


@pytest.mark.parametrize("arguments", [{"lighthouse_rope": "mean"}, OLD, {}], ids=["says it", "older", "has none"])
@pytest.mark.parametrize("write", [dcp, of_ranks, partial(of_ranks, name="mp_rank_00")])
def test_checkpoints_of_other_formats_go_on_as_they_were_trained(
    write: Callable[..., str], arguments: dict[str, Any], tmp_path: Path
) -> None:
    load = write(tmp_path / "run", **arguments)
    args = Namespace(load=load, finetune=False, ckpt_step=None, pretrained_checkpoint=None)
    assert rope.choice(args, "last", Path(load))[0] == "mean"
    assert (rope.choice(args, "mean", Path(load))) == ("mean", None)
    found = stored.before(args, Path(load))
    assert found
    assert found.state["opt_param_scheduler"] == {"max_lr": 0.5, "lr_decay_style": "linear"}


def test_a_checkpoint_between_two_is_the_one_that_goes_on(tmp_path: Path) -> None:
    load = checkpoint(tmp_path / "run", lighthouse_rope="last")
    of_ranks(tmp_path / "run" / "non_persistent", lighthouse_rope="mean")
    args = Namespace(
        load=load, finetune=False, ckpt_step=None, non_persistent_ckpt_type=None, non_persistent_global_ckpt_dir=None
    )
    assert rope.choice(args, "last", Path(load))[0] == "last"
    args.non_persistent_ckpt_type = "global"
    assert rope.choice(args, "last", Path(load))[0] == "mean"


def test_what_is_seen_first_when_it_is_loaded_is_refused_or_handed_on() -> None:
    """As in an object store, which is not looked at before."""
    args = Namespace(attention="lighthouse", lighthouse_rope="last", finetune=False)
    assert rope.loaded_problem(args, Namespace(lighthouse_rope="last"), "msc://run") is None
    assert "add --lighthouse-rope mean" in str(rope.loaded_problem(args, Namespace(), "msc://run"))
    dense = Namespace(**{**vars(args), "attention": "dense"})
    assert rope.loaded_problem(dense, Namespace(lighthouse_rope="mean"), "msc://run") is None
    assert dense.lighthouse_rope == "mean"
    args.finetune = True
    assert rope.loaded_problem(args, Namespace(), "msc://run") is None


def test_weights_of_another_run_begin_a_new_one(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path / "weights", **OLD, lighthouse_rope="mean")
    args = Namespace(load=str(tmp_path), finetune=False, ckpt_step=None, pretrained_checkpoint=weights, lighthouse_rope="last")
    assert rope.settled(args, SETTINGS).rope == "last"
    args.load = checkpoint(tmp_path / "own", lighthouse_rope="mean")
    rope.keep(args)
    assert args.lighthouse_rope == "mean"
