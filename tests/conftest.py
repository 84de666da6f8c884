"""Without a GPU the kernels run under Triton's interpreter, which must be asked for before they are imported."""

from __future__ import annotations

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # the files that take minutes first: with several workers none is left alone with one at the end
    items.sort(key=lambda item: item.path.parent.name not in ("mcore", "launch"))
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
