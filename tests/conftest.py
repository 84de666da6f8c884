"""Without a GPU the kernels run under Triton's interpreter, which must be asked for before they are imported."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Generator, Iterator

import pytest
import torch
from hypothesis import settings

from megatron_lighthouse import notice
from tests import left
from tests.interpreter import quicken
from tests.ranks import stand_ready

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    quicken()

if "WARM_START" not in os.environ:  # of all workers: see tests/mcore/forks.py
    os.environ["WARM_START"], os.environ["WARM_UNTIL"] = tempfile.mkdtemp() + "/warm", str(os.getpid())

# a machine may be busy: no example is late
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _quick_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check before queuing asks Megatron in tests/mcore/test_launch_check.py alone, in processes that have imported it."""
    from megatron_lighthouse.launch import megatron

    monkeypatch.setattr(megatron, "can_be_asked", lambda: False)


@pytest.fixture(autouse=True)
def _nothing_was_said() -> None:
    """Else what is said once would have been said to another test."""
    notice._say.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_is_kept() -> Iterator[None]:
    """A model that is built in this process hooks Megatron's training loop, and Megatron writes to the environment."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    before = left.environment(), left.signals()
    yield
    left.unhook()
    left.restore(*before)


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """By a file, whose session fixtures are not its own."""
    before = left.state()
    yield
    after = left.state()
    changed = {name: (before.get(name), after.get(name)) for name in {*before, *after} if before.get(name) != after.get(name)}
    assert not changed


LONGEST = """
    launch/test_cluster.py mcore/test_parity.py launch/test_requeue.py mcore/test_documents.py launch/test_stopped.py
    mcore/test_two_stage.py launch/test_scaling_study.py mcore/test_convert.py tests/test_kernels.py launch/test_jobs.py
    context_parallel/test_attention.py launch/test_common.py mcore/test_wall.py tests/test_packed_kernels.py
    mcore/test_around_wall.py launch/test_detached.py mcore/test_checkpoints.py tests/test_rotary.py mcore/test_parallax.py
    tests/test_enqueue.py mcore/test_tiles.py tests/test_select.py mcore/test_stage.py mcore/test_finite.py
    mcore/test_models.py tests/test_scorers.py mcore/test_toy_variant.py experiments/test_bench.py mcore/test_cpu.py
""".split()
"""Files of seven seconds and more of a quiet core. A worker takes a whole file at a time: those that wait for others, as for
Slurm, stand beside those whose ranks take both cores, and the longest come first."""


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


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()  # what is imported and collected is no garbage: to look at it takes long, and a fork would copy it
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    if not ON_GPU and not session.config.option.collectonly and any({"run_ranks", "together"} & set(vars(m)) for m in modules):
        stand_ready()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # Triton 3.9 lists what of it is left at the end, which garbage is not


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    allowed = item.get_closest_marker("gpu") or hasattr(report, "wasxfail") or not item.config.getoption("--no-skips")
    if report.skipped and not allowed:
        report.outcome = "failed"
        report.longrepr = f"skipped, which --no-skips does not allow: {report.longrepr}"
    return report
