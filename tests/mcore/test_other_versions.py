"""Options of Megatron after 0.19, and what is said of Transformer Engine's choice of a backend."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from types import SimpleNamespace

import pytest

from tests.mcore.test_checks import GOOD, plain_run
from tests.mcore.test_spec import transformer_config

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.mark.parametrize("name", ["attention_cp_layout", "linear_cp_layout"])
def test_a_layout_of_tokens_that_is_not_zigzag(name: str) -> None:
    """Options of releases after 0.19, of the arguments or of the model, whatever the attention."""
    from megatron_lighthouse.mcore.command_line.checks import check, check_run
    from megatron_lighthouse.mcore.command_line.run_options import check_run_options

    option = "--" + name.replace("_", "-")
    for layout in ("contiguous", SimpleNamespace(name="contiguous")):
        with pytest.raises(ValueError, match=f"{option} contiguous .* use zigzag"):
            check_run(Namespace(seq_length=256, **{name: layout}), transformer_config(), GOOD)
        with pytest.raises(ValueError, match=f"{option} contiguous .* use zigzag"):
            check_run_options(plain_run(**{name: layout}))
        config = transformer_config()
        setattr(config, name, layout)
        with pytest.raises(ValueError, match=f"{option} contiguous .* use zigzag"):
            check(config, GOOD, 256)
    for layout in (None, "zigzag", SimpleNamespace(name="zigzag")):
        check_run(Namespace(seq_length=256, **{name: layout}), transformer_config(), GOOD)
        check_run_options(plain_run(**{name: layout}))


def test_both_names_of_dynamic_context_parallelism_for_any_attention() -> None:
    from megatron_lighthouse.mcore.command_line.run_options import check_run_options

    for name in ("hybrid_context_parallel", "dynamic_context_parallel"):
        with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
            check_run_options(plain_run(**{name: True}))


TE_CHOICES = [
    (90, {}, r"cuDNN's.*; else FlashAttention 2 or 3 or 4, where it is installed; else its unfused one"),
    (80, {}, r"FlashAttention 2 or 3 or 4, .*; else cuDNN's"),
    (
        90,
        {"NVTE_FLASH_ATTN_V4": "0", "NVTE_FLASH_ATTN_V2": "0"},
        r"else FlashAttention 3,.*by NVTE_FLASH_ATTN_V2=0 .*_V4=0",
    ),
    (100, {"NVTE_FUSED_ATTN": "0"}, r"Transformer Engine's: FlashAttention 2 or 3 or 4.*by NVTE_FUSED_ATTN=0"),
    (
        100,
        {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1"},
        r"cuDNN's .*; else its unfused one.*by NVTE_FLASH_ATTN=0",
    ),
    (90, {f"NVTE_{name}_ATTN": "0" for name in ("FLASH", "FUSED", "UNFUSED")}, r"Transformer Engine's: none is left, by"),
]


@pytest.mark.parametrize(("capability", "environment", "said"), TE_CHOICES)
def test_what_transformer_engine_will_take(
    capability: int, environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_lighthouse.mcore.attention.te_choice import te_choice

    for name in [name for name in os.environ if name.startswith("NVTE_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert re.search(said, te_choice(capability))
