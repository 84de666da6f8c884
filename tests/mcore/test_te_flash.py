"""What FlashAttention 4 makes of the windows of Transformer Engine: stand-ins for its releases, and on a GPU both packages."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_lighthouse.mcore.attention import te_flash
from tests.tolerances import assert_close

type Window = tuple[bool, bool, int | None, int | None]


def earlier(causal: bool, left: int | None, right: int | None, mask_mod: Any = None) -> Window:
    """Up to 4.0.0b29: sides that add up to less than nothing are no window."""
    return later(causal, *((None, None) if None not in (left, right) and left + right < 0 else (left, right)), mask_mod)  # type: ignore[operator]


def later(causal: bool, left: int | None, right: int | None, mask_mod: Any = None) -> Window:
    """Causal, local, and the sides; a side is whatever number it is."""
    right = 0 if causal else right
    local = mask_mod is None and (left is not None or right not in (None, 0))
    return causal and not local, local, left, right if local else None


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    interface = ModuleType(te_flash.MODULE)
    monkeypatch.setitem(sys.modules, te_flash.MODULE, interface)
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setenv(te_flash.SWITCH, "1")
    return interface


def test_an_open_side_stays_open(there: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    setattr(there, te_flash.RESOLVE, later)
    assert later(True, -1, 0) == (False, True, -1, 0), "a window without a key"
    te_flash.mend()
    te_flash.mend()
    resolve = getattr(there, te_flash.RESOLVE)
    assert resolve(True, -1, 0) == later(True, None, None) == (True, False, None, None)
    assert resolve(False, -1, 3) == later(False, None, 3)
    assert resolve(False, -1, -1) == later(False, None, None) == (False, False, None, None)
    assert resolve(True, 128, 0) == later(True, 128, 0) == (False, True, 128, 0)
    assert resolve(True, -1, 0, mask_mod=len) == later(True, None, 0, len)
    assert resolve(True, left=-1, right=0) == later(True, None, None)
    assert resolve.__wrapped__ is later, "once"
    assert len(caplog.messages) == 1


def test_one_that_reads_it_so_is_left_as_it_is(there: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    setattr(there, te_flash.RESOLVE, earlier)
    te_flash.mend()
    assert getattr(there, te_flash.RESOLVE) is earlier
    assert not caplog.messages


@pytest.mark.parametrize("why", ["no function", "another's"])
def test_one_that_cannot_be_asked_is_not_called(why: str, there: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    if why == "another's":
        setattr(there, te_flash.RESOLVE, lambda window: window)
    te_flash.mend()
    assert os.environ[te_flash.SWITCH] == "0"
    assert f"{te_flash.SWITCH}=0" in caplog.text


@pytest.mark.parametrize("why", ["switched off", "no Transformer Engine"])
def test_where_it_is_not_called_nothing_is_changed(why: str, there: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    setattr(there, te_flash.RESOLVE, later)
    if why == "switched off":
        monkeypatch.setenv(te_flash.SWITCH, "0")
    else:
        monkeypatch.delitem(sys.modules, "transformer_engine")
    te_flash.mend()
    assert getattr(there, te_flash.RESOLVE) is later


@pytest.mark.gpu
@pytest.mark.skipif(not find_spec("transformer_engine"), reason="needs Transformer Engine")
def test_transformer_engine_attends_to_all_earlier_tokens_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flash_attn.cute.interface")
    for name, on in (("FLASH", "1"), ("FUSED", "0"), ("UNFUSED", "0")):
        monkeypatch.setenv(f"NVTE_{name}_ATTN", on)
    from transformer_engine.pytorch import DotProductAttention

    te_flash.mend()
    leaves = [torch.randn(512, 2, 4, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    grad = torch.randn(512, 2, 512, device="cuda", dtype=torch.bfloat16)
    out = DotProductAttention(4, 128, attn_mask_type="causal", attention_dropout=0.0, qkv_format="sbhd")(*leaves)
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    heads = scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in exact), is_causal=True)
    expected = heads.permute(2, 0, 1, 3).reshape(512, 2, 512)
    for one, other in zip(found, [expected, *torch.autograd.grad(expected, exact, grad.double())], strict=True):
        assert_close(one.double(), other, "bfloat16")
