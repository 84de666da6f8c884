"""A layer's output is freed after its projection and scattered again in backward: less memory, the same bits."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mcore.test_spec import SETTINGS, N, gpt, lighthouse_layers, local_spec, transformer_config

pytestmark = pytest.mark.usefixtures("megatron")


def model(discard: bool, **changes: Any) -> Any:
    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    torch.manual_seed(3)
    return gpt(with_lighthouse(local_spec(), replace(SETTINGS, discard_output=discard)), transformer_config(**changes))


def loss(gpt_model: Any) -> Tensor:
    tokens = torch.randint(0, 64, (1, N), generator=torch.Generator().manual_seed(5))
    return gpt_model(tokens, torch.arange(N).unsqueeze(0), None, labels=tokens).mean()


RECOMPUTE = {
    "none": {},
    "core attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@pytest.mark.parametrize("groups", [4, 2], ids="{} groups of 4 heads".format)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_the_same_loss_and_gradients(recompute: str, groups: int) -> None:
    found = []
    for discard in (True, False):
        one = model(discard, num_query_groups=groups, **RECOMPUTE[recompute])
        value = loss(one)
        value.backward()
        found.append([value.detach(), *(p.grad for p in one.parameters())])
    assert all(map(torch.equal, *found))


def test_the_output_is_gone_between_forward_and_backward() -> None:
    one, seen = model(True), {}
    for layer in one.decoder.layers:
        layer.self_attention.core_attention.register_forward_hook(
            lambda module, args, out, number=layer.layer_number: seen.update({number: (out.untyped_storage(), out.clone())})
        )
    value = loss(one)
    assert [number for number, (storage, _) in seen.items() if not storage.nbytes()] == lighthouse_layers(one)
    value.backward()
    for number in lighthouse_layers(one):
        storage, before = seen[number]
        assert torch.equal(torch.empty(0).set_(storage, 0, before.shape), before)


def test_without_gradients_nothing_is_freed() -> None:
    one, seen = model(True), []
    one.decoder.layers[2].self_attention.core_attention.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        loss(one)
    assert seen[0].untyped_storage().nbytes()


def test_a_checkpoint_that_reads_what_is_saved_keeps_it() -> None:
    """Non-reentrant checkpoints, and offloaders, put hooks on what autograd saves."""
    found = []
    for discard in (True, False):
        one = model(discard)
        value = torch.utils.checkpoint.checkpoint(loss, one, use_reentrant=False)
        value.backward()
        found.append([value.detach(), *(p.grad for p in one.parameters())])
    assert all(map(torch.equal, *found))


def test_nothing_is_held_after_backward() -> None:
    one, sources = model(True), []
    for number in lighthouse_layers(one):
        one.decoder.layers[number - 1].self_attention.core_attention.register_forward_hook(
            lambda module, args, out: sources.append(weakref.ref(out.lighthouse_source))
        )
    value = loss(one)
    assert len(sources) == 3
    assert all(source() for source in sources)
    value.backward()
    assert not any(source() for source in sources), "the loss is still there, the rows need not be"


def test_an_output_that_is_kept_holds_no_rows() -> None:
    one, seen = model(False), []
    one.decoder.layers[2].self_attention.core_attention.register_forward_hook(lambda module, args, out: seen.append(out))
    loss(one)
    assert not hasattr(seen[0], "lighthouse_source")
