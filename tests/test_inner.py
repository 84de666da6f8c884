"""The inner attention: which backend is chosen, what is said of it, and how FlashAttention is called."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention, notice, versions
from megatron_lighthouse.options import in_flags
from megatron_lighthouse.softmax import backends as inner
from megatron_lighthouse.softmax.backends import BACKENDS, choose
from megatron_lighthouse.softmax.names import INNER
from megatron_lighthouse.softmax.rows import RowKind
from tests.oracle import Problem, attention
from tests.tolerances import assert_close

MODULES = {"fa4": "flash_attn.cute", "fa3": "flash_attn_interface"}
GQA = Problem(96, 3, 2, 8, 4, batch=2, groups=2, queries_per_group=3, seed=1)
either_mode = pytest.mark.parametrize("deterministic", [False, True], ids=["any", "deterministic"])
either_scale = pytest.mark.parametrize("scale", [None, 0.3], ids="scale={}".format)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing was chosen or said before a test, and what it pretends is forgotten after it."""
    monkeypatch.setattr(inner, "_choose", cache(inner._choose.__wrapped__))
    monkeypatch.setattr(notice, "_say", cache(notice._say.__wrapped__))
    monkeypatch.setattr(inner, "_functions", {})
    monkeypatch.setattr(versions, "_installed", {"flash-attn-4": "4.0.0b36"}.get)
    yield
    torch.use_deterministic_algorithms(False)


def pretend(monkeypatch: pytest.MonkeyPatch, capability: int, problems: dict[str, str]) -> None:
    """A device of this capability on which every backend runs but those with a problem."""
    inner._choose.cache_clear()
    monkeypatch.setattr(RowKind, "capability", capability)
    for name, backend in list(BACKENDS.items()):
        monkeypatch.setitem(BACKENDS, name, replace(backend, problem=lambda rows, name=name: problems.get(name)))


def chosen(name: str = "auto", dtype: torch.dtype = torch.bfloat16, dim: int = 64) -> str:
    return choose(name, torch.device("cpu"), dtype, 4, 2, dim)


def refusal(name: str, dtype: torch.dtype = torch.bfloat16, dim: int = 64) -> str:
    with pytest.raises(ValueError, match=f"^config.inner {name} ") as error:
        chosen(name, dtype, dim)
    return str(error.value)


@dataclass
class FlashAttention:
    """Stands in for a FlashAttention module, and keeps the options it was called with."""

    answers_with_lse: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, deterministic: bool = False, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, S, H, D], [B, S, G, D], [B, S, G, D] -> [B, S, H, D], or that and the log-sum-exp."""
        self.calls.append({"deterministic": deterministic, **options})
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        sdpa, scale = torch.nn.functional.scaled_dot_product_attention, options["softmax_scale"]
        out = sdpa(q, k, v, is_causal=options["causal"], scale=scale, enable_gqa=True).transpose(1, 2)
        return (out, torch.zeros(out.shape[:3])) if self.answers_with_lse else out


@either_mode
@pytest.mark.parametrize(("capability", "fastest"), [(100, "fa4"), (90, "fa4"), (80, "fa2")])
def test_auto_takes_the_fastest(capability: int, fastest: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(deterministic)
    taken: list[str] = []
    while "sdpa" not in taken:  # the last, for it always runs
        pretend(monkeypatch, capability, dict.fromkeys(taken, "is broken"))
        taken.append(chosen())
    assert taken[0] == fastest
    assert taken.index("fa2") < taken.index("sdpa")
    assert sorted(taken) == sorted(BACKENDS.keys() - ({"cudnn"} if deterministic else set()))


def test_asking_for_determinism_later_chooses_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 90, {"fa3": "is broken", "fa4": "is broken"})
    assert chosen() == "cudnn"
    torch.use_deterministic_algorithms(True)
    assert chosen() == "fa2"
    assert "cuDNN's attention in torch is not deterministic, and torch.use_deterministic_algorithms is on" in refusal("cudnn")


def test_with_warnings_only_determinism_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own backends do not repeat then either."""
    pretend(monkeypatch, 90, {"fa3": "is broken", "fa4": "is broken"})
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert chosen() == "cudnn"


def test_the_choice_and_why_are_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    chosen()  # on a CPU nothing faster is to be expected, so there is nothing to explain
    for _ in range(2):
        pretend(monkeypatch, 100, {"fa4": "is lost", "fa3": "is old", "cudnn": "is broken", "sdpa": "is slower anyway"})
        assert chosen() == "fa2"
    start = "lighthouse: the inner attention of bfloat16, 4 query and 2 key/value heads of 64 is "
    why = "(FlashAttention 4 is lost; FlashAttention 3 is old; cuDNN's attention in torch is broken)"
    ends = ["torch's scaled_dot_product_attention.", f"FlashAttention 2 in torch {why}."]
    assert caplog.messages == [start + end for end in ends]


def test_command_lines_name_every_backend() -> None:
    assert ("auto", "te", *BACKENDS) == INNER


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "sdpa"])
def test_what_a_cpu_cannot_run_is_refused_with_advice_that_works(name: str) -> None:
    text, reason = refusal(name), "does not run on this device" if name in MODULES else "needs a GPU"
    assert f"{name} cannot run: {BACKENDS[name].title} {reason}. " in text
    offers = re.findall(r"config.inner (\w+) or (\w+)\.$", text)
    assert offers == [("auto", "sdpa")]
    assert {chosen(offer) for offer in offers[0]} == {"sdpa"}


def test_te_is_for_the_layers_of_transformer_engine() -> None:
    assert "--transformer-impl transformer_engine, or --lighthouse-inner auto" in in_flags(refusal("te"))


TO_128, TO_256 = [*range(8, 129, 8)], [*range(8, 257, 8)]
ALIKE = [dim for dim in TO_256 if dim > 128 or -(-dim // 16) * 16 == -(-dim // 32) * 32]
"""Those that FlashAttention 4 fills up to the same number of channels in all parts of its backward on Hopper."""


@pytest.mark.parametrize(
    ("name", "device", "takes"),
    [
        *(("fa3", 90, TO_256), ("fa4", 90, ALIKE), *(("fa4", device, [*TO_128, 256]) for device in (100, 103, 110))),
        *(("fa3", 100, []), *((name, device, []) for name in MODULES for device in (80, 89, 120, 121))),
    ],
)
def test_what_flash_attention_takes(name: str, device: int, takes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULES[name], FlashAttention())
    monkeypatch.setattr(RowKind, "capability", device)
    problem = BACKENDS[name].problem
    rows = [RowKind(torch.device("cpu"), torch.float16, 4, 2, dim, dim) for dim in range(1, 300)]
    assert [one.dim for one in rows if problem(one) is None] == takes
    if not takes:
        assert "does not run on this device" in refusal(name)
        return
    assert chosen(name, torch.float16, takes[-1]) == name
    grouped = replace(rows[0], dim=192, value_dim=128)
    narrow = replace(grouped, groups=4)
    assert problem(narrow) is None
    assert ("where query heads share them" in str(problem(grouped))) == ((name, device) == ("fa4", 90))  # its backward asserts
    assert "head dimensions 192 (keys) and 64 (values)" in str(problem(replace(narrow, value_dim=64)))
    assert "takes bf16 and fp16 alone" in refusal(name, torch.float32)
    for dim in (60, takes[-1] + 8):
        assert f"does not take head dimension {dim}" in refusal(name, dim=dim)


@pytest.mark.parametrize(
    ("release", "reason"),
    [
        *(
            (beta, f"is installed as {beta}, and is right from 4.0.0b31 on")
            for beta in ("4.0.0b3", "4.0.0b12", "4.0.0b30", "0.0.1")
        ),
        (None, "is installed, but does not say which release it is"),
        ("a fork", "is installed as a fork, which is no version"),
        *((good, None) for good in ("4.0.0b31", "4.0.0b36", "4.0.0", "4.0.0b36.dev3+g1234", "4.1")),
    ],
)
@either_mode
def test_a_release_with_a_wrong_backward_is_refused(
    release: str | None,
    reason: str | None,
    deterministic: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.use_deterministic_algorithms(deterministic)
    monkeypatch.setitem(sys.modules, MODULES["fa4"], FlashAttention())
    monkeypatch.setattr(versions, "_installed", lambda package: release)
    for name in BACKENDS.keys() - {"fa4", "sdpa"}:
        monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], problem=lambda rows: "is lost"))
    monkeypatch.setattr(RowKind, "capability", 100)
    if reason is None:
        assert chosen() == "fa4"
        return
    assert f"FlashAttention 4 {reason}" in refusal("fa4")
    assert "pip install" in refusal("fa4")
    assert chosen() == "sdpa"
    assert f"FlashAttention 4 {reason}" in caplog.text


def test_an_early_flash_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 2.8 ships a flash_attn.cute that knows no `deterministic`."""
    early = ModuleType("flash_attn.cute")
    early.flash_attn_func = lambda q, k, v, softmax_scale=None, causal=False: q  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn.cute", early)
    monkeypatch.setattr(RowKind, "capability", 100)
    assert "FlashAttention 4 is installed, but too old" in refusal("fa4")


def test_flash_attention_3_is_not_deterministic_beyond_dimension_192(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 90, {"fa4": "is lost"})
    torch.use_deterministic_algorithms(True)
    assert (chosen(dim=192), chosen(dim=256)) == ("fa3", "fa2")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        pytest.param(None, "is not installed (", id="missing"),
        pytest.param("import flash_attn_99._C", "is installed but does not import (No module named", id="half there"),
        pytest.param("raise OSError('libcudart.so.12')", "is installed but does not import (libcudart", id="broken"),
    ],
)
@pytest.mark.parametrize("name", MODULES)
def test_packages_that_do_not_import(
    name: str, source: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = ModuleType("flash_attn")  # FlashAttention 2 may be there without 4
    parent.__path__ = [str(tmp_path / "flash_attn")]
    monkeypatch.setitem(sys.modules, "flash_attn", parent)
    monkeypatch.setitem(sys.modules, MODULES[name], None)  # hides one that is installed
    if source is not None:
        monkeypatch.delitem(sys.modules, MODULES[name])
        file = tmp_path.joinpath(*MODULES[name].split("."), "__init__.py")
        file.parent.mkdir(parents=True)
        file.write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(RowKind, "capability", 90)
    assert f"cannot run: {BACKENDS[name].title} {reason}" in refusal(name)


@either_mode
@either_scale
@pytest.mark.parametrize("answers_with_lse", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("name", MODULES)
def test_how_flash_attention_is_called(
    name: str, answers_with_lse: bool, scale: float | None, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, generator = FlashAttention(answers_with_lse), torch.Generator().manual_seed(3)
    monkeypatch.setitem(sys.modules, MODULES[name], package)
    assert inner.import_problem(name, MODULES[name]) is None
    torch.use_deterministic_algorithms(deterministic)
    rows = [torch.randn(7, 3, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    out = BACKENDS[name].attend(*rows, scale)
    assert package.calls == [{"softmax_scale": scale, "causal": True, "deterministic": deterministic}]
    assert_close(out, BACKENDS["sdpa"].attend(*rows, scale), "float64")


@either_scale
def test_the_layer_attends_by_the_backend_that_its_config_names(scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, config = [torch.from_numpy(x) for x in GQA.arrays()], LighthouseConfig(**GQA.options)
    default = lighthouse_attention(*inputs, config, softmax_scale=scale)
    assert torch.equal(lighthouse_attention(*inputs, config.replace(inner="sdpa"), softmax_scale=scale), default)
    package = FlashAttention()
    monkeypatch.setitem(sys.modules, MODULES["fa3"], package)
    assert inner.import_problem("fa3", MODULES["fa3"]) is None
    pretend(monkeypatch, 90, {})
    flash = lighthouse_attention(*inputs, config.replace(inner="fa3"), softmax_scale=scale)
    assert [call["softmax_scale"] for call in package.calls] == [scale]
    _, expected = attention(*GQA.arrays(), GQA, scale)
    for out in (default, flash):
        assert_close(out, expected, "float64")
