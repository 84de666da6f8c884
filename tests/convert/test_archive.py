"""Tensors within a file, read as views of it: whatever `torch.save` may have written there, at any offset."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lighthouse.convert.archive import Mapped
from megatron_lighthouse.convert.memory import Reused

PLAIN = torch.arange(24, dtype=torch.float32).reshape(4, 6)
TENSORS = {
    "plain": PLAIN,
    "half": PLAIN.bfloat16(),
    "a byte each": PLAIN.to(torch.float8_e4m3fn),
    "turned": PLAIN.T,
    "part of a larger one": PLAIN[1:3, 2:5],
    "stepped": PLAIN[:, ::2],
    "expanded": torch.tensor([3.0]).expand(5),
    "one number": torch.tensor(2.5, dtype=torch.float64),
}


def saved(tensor: object) -> bytes:
    held = io.BytesIO()
    torch.save(tensor, held)
    return held.getvalue()


@pytest.mark.parametrize("before", [0, 3])
def test_tensors_one_after_the_other(before: int, tmp_path: Path) -> None:
    """An odd number of bytes before them leaves data where no alignment is."""
    parts = [b"x" * before, *map(saved, TENSORS.values())]
    (tmp_path / "file").write_bytes(b"".join(parts))
    mapped, offset = Mapped(tmp_path / "file"), before
    for (name, tensor), written in zip(TENSORS.items(), parts[1:], strict=True):
        found = mapped.tensor(offset, len(written))
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found.double(), tensor.double()), name
        offset += len(written)


def compressed() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(PLAIN))) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return made.getvalue()


@pytest.mark.parametrize(
    ("written", "says"), [(saved([PLAIN, PLAIN]), "list"), (compressed(), "compressed"), (b"nothing of the kind", "no archive")]
)
def test_what_is_no_tensor_is_refused(written: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(written)
    with pytest.raises(ValueError, match=says):
        Mapped(tmp_path / "file").tensor(0, len(written))


def test_memory_is_taken_once() -> None:
    memory = Reused()
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [((8, 8), torch.float32), ((4, 3), torch.bfloat16), ((), torch.float64)]
    found: list[Tensor] = [memory.tensor(shape, dtype) for shape, dtype in shapes]
    assert len({tensor.data_ptr() for tensor in found}) == 1
    for tensor, (shape, dtype) in zip(found, shapes, strict=True):
        assert (tensor.shape, tensor.dtype) == (torch.Size(shape), dtype)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # torch's writer would copy it otherwise
