"""FP8 attention: its scales are in a checkpoint. A core attention with Transformer Engine's interface keeps them here."""

from __future__ import annotations

import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from megatron_lighthouse.mcore.command_line.stage import Schedule
from tests.mcore.test_fp8 import ASKED
from tests.mcore.test_spec import SETTINGS, N, fused_qkv, gpt, local_spec, transformer_config

pytestmark = pytest.mark.usefixtures("megatron")


class Engine(torch.nn.Module):
    """With the interface of Megatron's `TEDotProductAttention`, and extra state as Transformer Engine's."""

    __module__ = "megatron.core.extensions.transformer_engine"

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **kwargs: Any) -> None:
        super().__init__()
        self.config, self.layer_number, self._tp_group = config, layer_number, kwargs["pg_collection"].tp
        self.history: list[float] = []
        """Of greatest magnitudes."""
        self.rows: list[int] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        self.rows.append(query.shape[0])
        self.history.append(float(query.detach().abs().max()))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)

    def get_extra_state(self) -> Tensor:
        if not self.history:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps(self.history)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        if state.numel():
            self.history = pickle.loads(state.numpy().tobytes())

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        return {}  # as Megatron's, unless it learns sinks


def model(settings: LighthouseSettings | None = SETTINGS, **changes: Any) -> Any:
    """Of six layers, the first and the last two dense; with no settings, all of them."""
    from megatron_lighthouse.mcore.attention.layer_specs import dense, with_lighthouse

    config, spec = transformer_config(), local_spec()
    vars(config).update({**ASKED, **changes})
    spec.submodules.self_attention.submodules.core_attention = Engine
    return gpt(dense(spec, config) if settings is None else with_lighthouse(spec, settings), config)


def cores(of: Any) -> list[Any]:
    return [layer.self_attention.core_attention for layer in of.decoder.layers]


def attend(core: Any, seed: float = 1.0) -> Tensor:
    from megatron.core.transformer.enums import AttnMaskType

    query, key, value = fused_qkv(1, torch.float32)
    out: Tensor = core(query * seed, key, value, None, attn_mask_type=AttnMaskType.causal)
    return out


@pytest.mark.parametrize("settings", [SETTINGS, None], ids=["lighthouse", "dense"])
def test_scales_of_all_layers_are_saved_and_loaded(settings: LighthouseSettings | None, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    trained, fresh = model(settings), model(settings)
    for number, core in enumerate(cores(trained)):
        attend(core, 1.0 + number)
    dist_checkpointing.save({"model": trained.sharded_state_dict()}, str(tmp_path))
    found = dist_checkpointing.load({"model": fresh.sharded_state_dict()}, str(tmp_path))
    fresh.load_state_dict(found["model"])
    kept = [core.history for core in cores(trained)]
    assert len({tuple(history) for history in kept}) == 6
    assert [core.history for core in cores(fresh)] == kept


def test_nothing_more_is_stored_in_bf16() -> None:
    def names(of: Any) -> list[str]:
        return [name for name in of.sharded_state_dict() if "core_attention" in name]

    assert not names(model(fp8_dot_product_attention=False))
    assert len(names(model())) == 6


@pytest.mark.parametrize("before", [{"fp8_dot_product_attention": False}, {}], ids=["bf16", "FP8"])
def test_a_checkpoint_without_scales_is_taken(
    before: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from megatron.core import dist_checkpointing

    from megatron_lighthouse import notice
    from megatron_lighthouse.mcore.loop import weights

    trained, fresh, args = model(**before), model(), Namespace(attention="lighthouse")
    for core in cores(trained):
        attend(core)
    dist_checkpointing.save({"model": trained.sharded_state_dict(), "args": args}, str(tmp_path))
    monkeypatch.setattr(weights, "get_checkpoint_name", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(weights, "attention_problems", lambda *_: [])
    notice._say.cache_clear()

    def load(load_dir: str, args: Any, rank0: bool, state: Any, *rest: Any) -> tuple[Any]:
        return (dist_checkpointing.load(state, load_dir),)

    (found,) = weights.load_base(load, str(tmp_path), args, False, {"model": fresh.sharded_state_dict()}, 1, True)
    fresh.load_state_dict(found["model"])
    assert [bool(core.history) for core in cores(fresh)] == [not before] * 6
    assert ("has no scales of FP8 attention: these begin anew" in caplog.text) == bool(before)
    torch.testing.assert_close(fresh.state_dict()["output_layer.weight"], trained.state_dict()["output_layer.weight"])


def test_a_layer_keeps_its_scales_at_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lighthouse.mcore.loop import switch

    now = [1]
    monkeypatch.setattr(switch, "iteration", lambda: now[0])
    settings = LighthouseSettings(SETTINGS.config, dense_first=1, dense_last=2, rope="mean", schedule=Schedule(stage2_at=2))
    core = cores(model(settings))[1]
    attend(core)
    now[0] = 3
    attend(core, 2.0)
    assert core.rows == [SETTINGS.config.geometry(N).gathered_length, N]
    assert len(core.history) == 2, "the dense layer goes on with the same history"


def test_layers_that_share_a_spec_are_of_one_class() -> None:
    from megatron_lighthouse.mcore.attention.scales import class_with_scales

    once = class_with_scales(Engine)
    assert once is not Engine
    assert class_with_scales(once) is once
    assert once.__module__ == Engine.__module__, "by which it is known as Transformer Engine's"
