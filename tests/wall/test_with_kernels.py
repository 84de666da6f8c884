"""The whole function by the kernels, over pieces, and what is taken where; under Triton's interpreter on a CPU."""

from __future__ import annotations

import functools

import pytest
import torch

from megatron_lighthouse.kernels import wall as kernels
from megatron_lighthouse.profiling.names import kernel_mark
from megatron_lighthouse.wall import attention, decay, layer, reference
from megatron_lighthouse.wall.attention import wall_attention
from megatron_lighthouse.wall.cut import Step
from megatron_lighthouse.wall.earlier import Plain
from megatron_lighthouse.wall.implementations import earlier_for, makers_for
from tests.steps import DEVICE
from tests.wall.oracle import formula, inputs, with_grads


@pytest.mark.parametrize("gate", [-0.05, -9.0])
def test_pieces_by_the_kernels(gate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that end within pieces, shared gates, a sink, and V that is not K."""
    monkeypatch.setattr(attention, "build", functools.partial(layer.build, kernels="triton"))
    monkeypatch.setattr(Step, "TOKENS", 24)
    tensors = inputs(40, 1, 2, 1, (8, 12), gate=gate, tied=True, scalar=-0.1, sink=True)
    how = {"cu_seqlens": torch.tensor([0, 1, 35, 40])}
    expected = with_grads(formula, tensors, **how)
    found = with_grads(wall_attention, [x.to(DEVICE, torch.float32) for x in tensors], **how)
    for one, other in zip(found, expected, strict=True):
        assert float((one.double().cpu() - other).norm() / other.norm()) < 2e-5


@pytest.mark.parametrize(
    ("kernel", "direction"),
    [("forward", "forward"), ("prepare", None), ("keys_backward", "backward"), ("suffix_sums", "backward")],
)
def test_profiles_know_the_kernels(kernel: str, direction: str | None) -> None:
    assert kernel_mark(f"wall_{kernel}") == ("attend", direction)


def test_what_is_taken_where(caplog: pytest.LogCaptureFixture) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for taken in ((32, 32), (48, 48), (64, 64), (80, 128), (128, 64), (64, 128), (192, 192), (256, 256)):
        assert makers_for("auto", gpu, torch.bfloat16, taken) == (kernels, kernels)
    for unseen in ((16, 16), (40, 40), (32, 64), (192, 128)):
        assert makers_for("auto", gpu, torch.bfloat16, unseen) == (reference, decay)
        assert makers_for("triton", gpu, torch.bfloat16, unseen) == (kernels, kernels)
    assert makers_for("auto", gpu, torch.float32, (64, 64)) == makers_for("auto", gpu, torch.float32, (128, 128))
    assert makers_for("auto", gpu, torch.float32, (64, 64)) == (kernels, kernels)
    assert makers_for("auto", gpu, torch.float32, (80, 80)) == (reference, decay)
    assert makers_for("auto", cpu, torch.bfloat16, (128, 128)) == (reference, decay)
    assert makers_for("reference", gpu, torch.bfloat16, (128, 128)) == (reference, decay)
    with pytest.raises(ValueError, match="--wall-kernels triton cannot run: they take head dimensions up to 256, not 320"):
        makers_for("triton", gpu, torch.bfloat16, (320, 320))
    for _ in range(2):
        assert makers_for("auto", gpu, torch.float16, (128, 128)) == (reference, decay)
    said = "plain PyTorch, many times slower than the kernels: in fp16 their gradients were wrong on an H200 (bf16 works)."
    assert sum(said in message for message in caplog.messages) == 1
    with pytest.raises(ValueError, match=r"--wall-kernels triton cannot run: in fp16 .* \(bf16 works\). Use auto or reference"):
        makers_for("triton", gpu, torch.float16, (128, 128))
    query = torch.zeros(4, 1, 2, 8)
    assert isinstance(earlier_for(query, query, 2, 1.0, biased=False, masked=False), Plain)
