"""The entry point in processes forked from one that has imported it: imports take most of a short run.

Runs under torchrun and Slurm, which other tests start, are interpreters of their own.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import runpy
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]


class Fork:
    """`python -m module …`, the leader of a process group. As much of `subprocess.Popen` as the harness needs."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], stdout: IO[Any], cwd: Path, **_: Any) -> None:
        self.returncode: int | None = None
        self.pid = _ask({"argv": command[2:], "environment": env, "output": stdout.name, "folder": str(cwd)})

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(self.pid)
        return self.returncode

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.01)


@cache
def _server() -> subprocess.Popen[str]:
    """It ends with this process, whose end closes the pipe."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", "tests.mcore.forks"], text=True, env=environment, cwd=ROOT, **pipes)


def _ask(request: object) -> Any:
    server = _server()
    assert server.stdin
    assert server.stdout
    print(json.dumps(request), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


def _serve() -> None:
    """Answer a command with the process that runs it, and a process with its exit status, null while it runs."""
    from megatron_lighthouse import cpu

    before = dict(os.environ)
    cpu.install()
    installed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    import megatron.core.datasets.helpers
    import megatron.core.models.mimo.optimizer
    import megatron.core.tokenizers.text  # noqa: F401  with it transformers
    from megatron.training.arguments import add_megatron_arguments

    import megatron_lighthouse.mcore.loop.pretrain
    import megatron_lighthouse.recipe.evaluation_plots
    import megatron_lighthouse.recipe.trained  # noqa: F401
    from tests.interpreter import quicken

    quicken()
    inspect.getsource = cache(inspect.getsource)  # Megatron reads the help of its flags in the source, each time
    add_megatron_arguments(ArgumentParser())
    gc.freeze()  # what is imported is no garbage: a fork that looked would copy it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            ended, status = os.waitpid(request, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        elif answer := os.fork():
            os.setpgid(answer, answer)
        else:
            answers.close()
            request["environment"] |= installed
            return _run(**request)
        print(json.dumps(answer), file=answers, flush=True)


def _run(argv: list[str], environment: dict[str, str], output: str, folder: str) -> None:
    for file, numbers, mode in ((os.devnull, (0,), os.O_RDONLY), (output, (1, 2), os.O_WRONLY | os.O_APPEND)):
        opened = os.open(file, mode)
        for number in numbers:
            os.dup2(opened, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    if "--save" in argv:
        from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

        get_write_results_queue("fork")  # by default a new interpreter, which imports torch again
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
