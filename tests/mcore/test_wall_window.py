"""Wall with --window-size: windowed layers are Wall over windows, alone, over documents, and in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_lighthouse.wall.cut import Step
from tests.mcore.harness import Run, run, some_slow
from tests.mcore.test_checkpoints import save_interval
from tests.mcore.test_packed import documents_of_rows
from tests.mcore.test_spec import N, gpt, local_spec, transformer_config
from tests.mcore.test_wall import LAYOUTS, NONE, SINKS, WHOLE, from_saved, settings
from tests.tolerances import assert_close
from tests.wall.oracle import formula

GROUPS, HEADS, DIM = 2, 4, 8


def model_of(**windows: Any) -> Any:
    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    torch.manual_seed(5)
    config = transformer_config(num_layers=2, init_method_std=0.3, **windows)
    return gpt(with_lighthouse(local_spec(), settings(gate_bias=2.0)), config).double()


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("packed", [False, True], ids=["", "documents"])
@pytest.mark.parametrize(("every", "windows"), [(None, (7, 7)), (2, (7, None)), ([0, 1], (None, 7))], ids=str)
def test_layers_see_what_megatron_says(
    every: Any, windows: tuple[int | None, ...], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Step, "TOKENS", 24)
    model, seen = model_of(window_size=(6, 0), window_attn_skip_freq=every), {}
    for layer in model.decoder.layers:
        core = layer.self_attention.core_attention
        core.register_forward_hook(lambda _, given, out, n=layer.layer_number: seen.update({n: (*given[:3], out)}))
    how: dict[str, Any] = {}
    if packed:
        from megatron_lighthouse.mcore.attention.packed import packed as packing

        how["packed_seq_params"] = packing(documents_of_rows(), N)
    rows = 2
    model(torch.randint(64, (rows, N)), torch.arange(N).expand(rows, N), None, **how)
    for number, window in enumerate(windows, 1):
        query, key, both, out = seen[number]
        gate = logsigmoid(both[:, :, GROUPS:])
        given = [query, key, both[:, :, :GROUPS], gate]
        assert_close(out, expected(given, window, packed).flatten(2), "ranks float64")


def expected(given: list[Tensor], window: int | None, packed: bool) -> Tensor:
    """Packed rows are one sequence of documents."""
    if not packed:
        return formula(*given, window=window)
    rows = [x.transpose(0, 1).flatten(0, 1).unsqueeze(1) for x in given]
    out = formula(*rows, window=window, cu_seqlens=documents_of_rows().cu_seqlens.long())
    return out.unflatten(0, (2, N)).squeeze(2).transpose(0, 1)


OPTIONS = {
    "alone": ("--window-attn-skip-freq", "2"),
    "documents": ("--dataloader-inter-document-masking",),
}


def train(folder: Path, kind: str, *options: str, ranks: int = 1) -> Run:
    windows = ("--window-size", "40,0", *OPTIONS[kind])
    return run(folder, "--attention", "wall", *NONE, *SINKS, *WHOLE, *windows, "--train-iters", "3", *options, ranks=ranks)


@pytest.fixture(scope="module", params=some_slow(OPTIONS, ["documents"]))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Run]:
    """Three iterations in one process, the first of which is saved."""
    folder = tmp_path_factory.mktemp("windows")
    return request.param, train(folder, request.param, *save_interval(folder / "checkpoint", 1))


@pytest.mark.parametrize("name", some_slow(["tensor", "context", "heads", "pipeline"], {"tensor", "heads", "pipeline"}))
def test_a_layout_changes_nothing(name: str, tmp_path: Path, whole: tuple[str, Run]) -> None:
    options, ranks = LAYOUTS[name]
    kind, one = whole
    found = train(tmp_path, kind, *options.split(), *from_saved(one), ranks=ranks)
    assert list(found.losses) == [2, 3]
    assert_close(list(found.losses.values()), [one.losses[i] for i in (2, 3)], "parallel loss")
    assert_close(*[[run.gradient_norms[i] for i in (2, 3)] for run in (found, one)], "parallel gradient norm")
