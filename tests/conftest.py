"""Without a GPU the kernels run under Triton's interpreter, which must be asked for before they are imported."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch
from hypothesis import settings

from tests.interpreter import quicken

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    quicken()

# a machine may be busy: no example is late
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

LONGEST = """
    launch/test_cluster.py mcore/test_parity.py tests/test_kernels.py launch/test_scaling_study.py experiments/test_bench.py
    mcore/test_finite.py mcore/test_toy_variant.py mcore/test_two_stage.py mcore/test_checkpoints.py mcore/test_evaluate.py
    context_parallel/test_attention.py tests/test_select.py tests/test_rotary.py tests/test_scorers.py tests/test_gather.py
    mcore/test_evaluate_arguments.py mcore/test_stage.py
""".split()
"""Files that take half a minute and more, the longest first: a worker takes a whole file at a time."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail what is skipped for any reason but a GPU that is not there")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # with several workers none is left alone with a long file at the end
    def place(item: pytest.Item) -> int:
        name = "/".join(item.path.parts[-2:])
        rest = len(LONGEST) + (item.path.parent.name not in ("experiments", "mcore", "launch"))
        return LONGEST.index(name) if name in LONGEST else rest

    items.sort(key=place)
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    allowed = item.get_closest_marker("gpu") or hasattr(report, "wasxfail") or not item.config.getoption("--no-skips")
    if report.skipped and not allowed:
        report.outcome = "failed"
        report.longrepr = f"skipped, which --no-skips does not allow: {report.longrepr}"
    return report
