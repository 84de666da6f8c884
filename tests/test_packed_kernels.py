"""The kernels over packed documents against the reference; and the inner attentions that take documents."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention, lighthouse_select, notice
from megatron_lighthouse.kernels.lighthouse import packed as packed_kernels
from megatron_lighthouse.kernels.lighthouse.packed import deal
from megatron_lighthouse.lighthouse.packed import reference as packed_reference
from megatron_lighthouse.lighthouse.packed import tables as packed_tables
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.packed.shares import Shares
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.softmax import backends
from megatron_lighthouse.softmax import documents as softmax_documents
from megatron_lighthouse.softmax.backends import BACKENDS, FAMILIES
from megatron_lighthouse.softmax.documents import documents_attention
from megatron_lighthouse.softmax.rows import DOCUMENTS, RowKind
from tests.compiled import compiled
from tests.packed_oracle import Packed, of
from tests.steps import DEVICE, poisoned, random_like, restride, tensors
from tests.tolerances import assert_close

ROTARY = Rotary(torch.tensor([0.8, 0.1]))
NARROW = "values narrower than keys, turned"
ROWS = {
    "two levels of three": (of((1, 30, 8, 24, 2), levels=2, pooling=3, groups=1), None, "norm"),
    "turned": (of((9, 3, 40, 33), dim=8), ROTARY, "norm"),
    "four levels": (of((50, 16, 7), levels=4, tile_windows=3, groups=1), ROTARY, "summary"),
    "mass, of ragged tiles": (of((50, 16, 21), tile_windows=3, groups=2), ROTARY, "mass"),
    NARROW: (of((9, 3, 40, 33), dim=8), ROTARY, "mass"),
    "attended streams": (of((21, 5, 40), groups=1, pin_first=False), None, "dilated"),
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was chosen or said before a test, and what it pretends is forgotten after it."""
    monkeypatch.setattr(backends, "_choose", cache(backends._choose.__wrapped__))
    monkeypatch.setattr(notice, "_say", cache(notice._say.__wrapped__))
    monkeypatch.setattr(backends, "_functions", {})
    monkeypatch.setattr(softmax_documents, "_taken", cache(softmax_documents._taken.__wrapped__))


def bounds(packed: Packed) -> Tensor:
    return torch.tensor(packed.bounds, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("name", ROWS)
def test_the_layer_equals_the_reference(name: str) -> None:
    packed, rotary, scorer = ROWS[name]
    inputs = restride("slices of one fused projection", *tensors(packed, "float32"))
    if name == NARROW:
        inputs[2] = inputs[2][..., :5]
    (grad,) = random_like([inputs[0][..., : inputs[2].shape[3]]])
    found = []
    for steps in ("kernels", "reference"):
        config = LighthouseConfig(**packed.options, steps=steps, scorer=scorer)
        leaves = [x.detach().requires_grad_() for x in inputs]
        with poisoned():
            chosen = lighthouse_select(*inputs[:2], config, value=inputs[2], rotary=rotary, cu_seqlens=bounds(packed))
            out = lighthouse_attention(*leaves, config, rotary=rotary, cu_seqlens=bounds(packed))
            found.append((chosen, out, *torch.autograd.grad(out, leaves, grad)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][0].shape[2] < packed.seq_length
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        assert_close(a, b, "float32")


def test_a_rank_s_pieces_equal_the_reference() -> None:
    packed = of((40, 3, 33, 5, 47), groups=1)
    documents = Documents.of(bounds(packed), packed.seq_length)
    shares = Shares.of(Packing.of(documents, LighthouseConfig(**packed.options).rule), Layout(2, 1))
    generator = torch.Generator().manual_seed(5)
    length, pieces = shares.pieces.seq_length, shares.pieces
    inputs = [torch.randn((length, 1, n, 8), generator=generator).to(DEVICE) for n in (2, 1, 1)]
    numbers = torch.randperm(pieces.pyramid_length, generator=generator).to(DEVICE)
    places = numbers.where(shares.wants & (numbers % 2 == 0), -1).int().view(1, 1, -1)
    selection = Selection(pieces, places, pieces.pyramid_length)
    rows = packed_reference.gather(*inputs, selection)[0]
    there = (places >= 0).flatten()
    found = []
    for steps in (packed_kernels, packed_reference):
        with poisoned():
            gathered = steps.gather(*inputs, selection)[0][numbers[there]]
            scores = steps.score(*inputs[:2], pieces)
            whole = [torch.cat([x, x])[: documents.tokens] for x in inputs]
            norms = steps.attended_norms(*whole, documents, ((0, 5, 17), (4, 40, 47)))
            found.append((gathered, steps.scatter(rows, selection), scores, norms[..., 5:17], norms[..., -7:]))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, "float32")
    every = packed_reference.attended_norms(*whole, documents)
    assert torch.equal(norms[..., 5:17], every[..., 5:17])


@pytest.mark.parametrize("size", [2, 5])
def test_tables_of_a_deal_are_those_of_the_reference(size: int) -> None:
    """Of documents shorter than 2C tokens and of some whose entries spill over several chunks."""
    packed = of((40, 1, 9, 3, 6, 16, 25), groups=3)
    documents = Documents.of(bounds(packed), packed.seq_length)
    packing, (query, key, _) = Packing.of(documents, LighthouseConfig(**packed.options).rule), tensors(packed)
    places = packed_reference.select(packed_reference.score(query, key, packing), packing, True).places[0]
    for rank in range(size):
        shares = Shares.of(packing, Layout(size, rank))
        found = []
        for steps in (packed_tables, deal):
            made = packed_tables.Tables.empty(shares, 3)
            flags = torch.zeros(packed_tables.FLAGS * 3 * len(shares.row_at) + 1, dtype=torch.int32, device=DEVICE)
            steps.fill_flags(flags[1:], places, shares)
            steps.fill_tables(made, flags.cumsum(0, dtype=torch.int32), places, shares)
            found.append((flags, made.gathered, made.scattered, *made.out, *made.back))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        assert (found[0][1] >= 0).any()


BESIDE_LOOPS = {"lighthouse_packed_attended": 24}
"""Bytes that Triton 3.9 spills on Hopper: five words, written before a loop over keys and read after it."""


@pytest.mark.parametrize("capability", [90, pytest.param(100, marks=pytest.mark.slow)], ids="sm_{}".format)
def test_compiles_for_hopper_and_blackwell_without_spills(capability: int) -> None:
    call = ("compile_packed", capability, (98304, 3, 4, 1536, 128), "bf16", 128)
    reports = compiled(call)[call]
    assert len(reports) == 14
    for kernel, registers, shared_bytes, spilled_bytes in reports:
        print(f"sm_{capability} {kernel}: {registers} registers, {shared_bytes} bytes shared, {spilled_bytes} spilled")
        assert spilled_bytes <= BESIDE_LOOPS.get(kernel, 0), kernel
        assert shared_bytes <= (227 if kernel == "lighthouse_packed_attended" else 48) * 1024


@pytest.mark.parametrize(("name", "module"), [("fa4", "flash_attn.cute"), ("fa3", "flash_attn_interface")])
@pytest.mark.parametrize("scale", [None, 0.3], ids="scale={}".format)
def test_flash_attention_is_told_the_documents_by_name(
    name: str, module: str, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, *, deterministic: bool = False, **options: Any) -> Any:
        calls.append({"deterministic": deterministic, **options})
        starts = options["cu_seqlens_q"].tolist()
        out = []
        for start, end in pairwise(starts):
            one = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            given = {"is_causal": options["causal"], "scale": options["softmax_scale"], "enable_gqa": True}
            out.append(torch.nn.functional.scaled_dot_product_attention(*one, **given)[0].transpose(0, 1))
        return torch.cat(out), None

    stand_in = ModuleType(module)
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func
    for part in range(1, module.count(".") + 1):
        monkeypatch.setitem(sys.modules, module.rsplit(".", part)[0], ModuleType(module.rsplit(".", part)[0]))
    monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setattr(RowKind, "capability", 90)
    monkeypatch.setattr(backends, "too_old", lambda package: None)
    packed = of((9, 3, 20), dim=32)
    query, key, value = tensors(packed, "bfloat16")
    documents = Documents.of(bounds(packed), packed.seq_length)
    out = documents_attention(name, query, key, scale)(query, key, value, documents)
    wide = [x.double() for x in (query, key, value)]
    assert_close(out, documents_attention("sdpa", *wide[:2], scale)(*wide, documents), "bfloat16")
    (call,) = calls
    assert call.pop("cu_seqlens_q") is call.pop("cu_seqlens_k") is documents.cu_seqlens
    longest = {"max_seqlen_q": 20, "max_seqlen_k": 20}
    assert call == {"softmax_scale": scale, "causal": True, "deterministic": False, **longest}


@pytest.mark.parametrize("told", [False, True], ids=["torch 2.11", "torch 2.15"])
def test_torchs_own_attention_over_documents_is_told_to_be_causal_and_flash_attention(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel needs a GPU: a stand-in that reads what it is told."""
    from torch.nn.attention import varlen

    def attend(
        q: Tensor, k: Tensor, v: Tensor, begins: Tensor, far: Tensor, most: int, most_far: int, scale: Any, window: Any
    ) -> Tensor:
        assert begins is far
        assert (most, most_far, window) == (20, 20, (-1, 0))
        # what chooses between torch 2.15's kernels
        assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()) == (True, not told)
        parts = zip(*(x.unsqueeze(1).split(begins.diff().tolist()) for x in (q, k, v)), strict=True)
        return torch.cat([BACKENDS["sdpa"].attend(*part, scale) for part in parts]).squeeze(1)

    def older(*given: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
        return attend(*given, scale, window_size)

    def newer(
        *given: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False
    ) -> Tensor:
        assert enable_gqa
        return attend(*given, scale, window_size)

    monkeypatch.setattr(varlen, "varlen_attn", newer if told else older)
    monkeypatch.setattr(softmax_documents, "CHOOSES", told)
    monkeypatch.setitem(BACKENDS, "fa2", replace(BACKENDS["fa2"], problem=lambda rows: None))
    packed = of((9, 3, 20), dim=8)
    query, key, value = tensors(packed, "float64")
    documents = Documents.of(bounds(packed), packed.seq_length)
    out = documents_attention("fa2", query, key, 0.3)(query, key, value, documents)
    assert_close(out, documents_attention("sdpa", query, key, 0.3)(query, key, value, documents), "float64")


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ((9, 3, 20, 1, 1, 32, 15), [(9, 3), (24,), (1, 1), (32,), (16,)]),
        ((16, 17), [(16,), (24,)]),
        ((40,), [(40,)]),
        ((15, 4), [(15, 4)]),
    ],
    ids=["mixed", "long", "one", "short"],
)
def test_long_documents_have_a_call_each_and_those_between_one(
    lengths: tuple[int, ...], calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 4 heads, those of 16 tokens and more, filled up to a multiple of 8.

    Both kernels need a GPU: stand-ins that note their documents.
    """
    called: list[tuple[int, ...]] = []

    def alone(*rows: Any) -> Tensor:
        called.append((len(rows[0]),))
        assert len(calls) > 1 or rows[0] is inputs[0], "a row of one part is not cut"
        return BACKENDS["sdpa"].attend(*rows)

    def together(query: Tensor, key: Tensor, value: Tensor, scale: float | None, documents: Documents) -> Tensor:
        assert documents.cu_seqlens.tolist() == [0, *accumulate(documents.lengths)]
        called.append(documents.lengths)
        assert len(calls) > 1 or query is inputs[0], "a row of one part is not cut"
        return documents_attention("sdpa", query, key, scale)(query, key, value, documents)

    monkeypatch.setattr(softmax_documents, "LONG", 4 * 16**2)
    monkeypatch.setattr(softmax_documents, "PLANNED", 8)
    monkeypatch.setattr(softmax_documents, "_torch", together)
    monkeypatch.setattr(softmax_documents, "_torch_problem", lambda rows: None)
    monkeypatch.setitem(BACKENDS, "cudnn", replace(BACKENDS["cudnn"], problem=lambda rows: None, attend=alone))
    packed = of(lengths, dim=8)
    inputs = [x.requires_grad_() for x in tensors(packed, "float64")]
    documents = Documents.of(bounds(packed), packed.seq_length)
    outs = [documents_attention(name, inputs[0], inputs[1], 0.3)(*inputs, documents) for name in ("cudnn", "sdpa")]
    assert called == calls
    grad = torch.randn_like(outs[0])
    for ours, theirs in zip(*([out, *torch.autograd.grad(out, inputs, grad)] for out in outs), strict=True):
        assert_close(ours, theirs, "float64")


def test_what_cannot_attend_over_documents_is_refused_or_passed_over_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert FAMILIES[DOCUMENTS].keys() == BACKENDS.keys()
    query, key = torch.zeros(4, 1, 4, 64), torch.zeros(4, 1, 2, 64)
    with pytest.raises(ValueError, match=r"config.inner cudnn cannot run: .* For .* use config.inner auto or sdpa"):
        documents_attention("cudnn", query, key)
    with pytest.raises(ValueError, match=r"config\.inner te is the attention of Transformer Engine"):
        documents_attention("te", query, key)
    monkeypatch.setattr(RowKind, "capability", 90)
    for _ in range(2):
        documents_attention("auto", query, key)
    (said,) = caplog.messages
    assert said.startswith("lighthouse: the inner attention over documents of float32, 4 query and 2 key/value heads of 64 is ")
    assert "document by document (FlashAttention 4 takes bf16 and fp16 alone; " in said
