"""Our commands in processes forked from one that has imported them: imports take most of a short run.

What another program starts (torchrun, a script, Slurm) is a fork too in the environment `warm`, else an interpreter of its own.
"""

from __future__ import annotations

import ast
import gc
import inspect
import json
import os
import runpy
import select
import socket
import struct
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

ROOT = Path(__file__).parents[2]


class Fork:
    """`python -m module …`, the leader of a process group. As much of `subprocess.Popen` as the harness needs."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], stdout: IO[Any], cwd: Path, **_: Any) -> None:
        self.returncode: int | None = None
        self.server = socket.socket(socket.AF_UNIX)
        self.server.connect(_server())
        socket.send_fds(self.server, [b" "], [stdout.fileno(), stdout.fileno()])
        request = {"argv": command[2:], "environment": dict(env), "folder": str(cwd)}
        self.server.sendall(json.dumps(request).encode() + b"\n")
        self.answers = self.server.makefile()
        self.pid = int(self.answers.readline())

    def poll(self) -> int | None:
        return self.wait() if self.returncode is None and select.select([self.server], [], [], 0)[0] else self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = int(self.answers.readline())
            self.answers.close()
            self.server.close()
        return self.returncode


def warm() -> dict[str, str]:
    """Variables with which `python -m` of our commands, whoever starts it, is a fork: see warm_start/sitecustomize.py."""
    folders = [str(ROOT)]
    if not torch.cuda.is_available():  # a fork has no CUDA
        _server()
        folders.append(str(ROOT / "tests" / "warm_start"))
    return {"PYTHONPATH": os.pathsep.join(folders)}


@cache
def _server() -> str:
    """The socket of the server, which whoever asks first starts."""
    path = os.environ["WARM_START"]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(own := f"{path}{os.getpid()}")
    listener.listen(64)
    with suppress(FileExistsError):
        os.link(own, path)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.mcore.forks", str(listener.fileno()), os.environ["WARM_UNTIL"]]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, cwd=ROOT, pass_fds=[listener.fileno()])
    return path


def _serve() -> None:
    """Run what is asked for in forks, until the tests end."""
    from megatron_lighthouse import cpu

    before = dict(os.environ)
    cpu.install()
    installed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    import megatron.core.datasets.helpers
    import megatron.core.models.mimo.optimizer
    import megatron.core.tokenizers.text  # noqa: F401  with it transformers
    from megatron.training import argument_utils
    from megatron.training.arguments import add_megatron_arguments

    import megatron_lighthouse.launch.megatron
    import megatron_lighthouse.launch.restart
    import megatron_lighthouse.mcore.loop.pretrain
    import megatron_lighthouse.plan.__main__
    import megatron_lighthouse.recipe.evaluation_plots
    import megatron_lighthouse.recipe.trained  # noqa: F401
    from tests.interpreter import quicken

    quicken()
    # Megatron reads the help of its flags in the source, each time
    inspect.getsource = cache(inspect.getsource)
    argument_utils.ast = SimpleNamespace(**{**vars(ast), "parse": cache(ast.parse)})
    add_megatron_arguments(ArgumentParser())
    gc.freeze()  # what is imported is no garbage: a fork that looked would copy it
    listener, tests = socket.socket(fileno=int(sys.argv[1])), os.pidfd_open(int(sys.argv[2]))
    started: list[int] = []
    while tests not in select.select([listener, tests], [], [])[0]:
        asking, _ = listener.accept()
        if not (process := os.fork()):
            listener.close()
            return _stand_behind(asking, installed)
        started = [earlier for earlier in started if not os.waitpid(earlier, os.WNOHANG)[0]] + [process]
        asking.close()


def _stand_behind(asking: socket.socket, installed: Mapping[str, str]) -> None:
    """Run what the process at the other end of `asking` was to run, where it is and with its output. The two end together."""
    _, (output, errors), _, _ = socket.recv_fds(asking, 1, 2)
    request = json.loads(asking.makefile().readline())
    request["environment"] |= installed
    waiting, _, _ = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if os.readlink(f"/proc/{waiting}/ns/net") != os.readlink("/proc/self/ns/net"):  # on a node of the emulated Slurm
        os.setns(os.pidfd_open(waiting), os.CLONE_NEWNS | os.CLONE_NEWNET | os.CLONE_NEWUTS | os.CLONE_NEWPID)
    if not (process := os.fork()):
        os.setpgid(0, 0)
        asking.close()
        return _run(**request, output=output, errors=errors)
    with suppress(PermissionError, ProcessLookupError):  # whichever of the two comes first
        os.setpgid(process, process)
    with suppress(BrokenPipeError, ConnectionResetError):
        asking.sendall(f"{process}\n".encode())
        if asking in select.select([asking, os.pidfd_open(process)], [], [])[0]:  # it was killed
            os.killpg(process, 9)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        asking.sendall(f"{status}\n".encode())
    os._exit(0)


def _run(argv: list[str], environment: dict[str, str], folder: str, output: int, errors: int) -> None:
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, errors)):
        os.dup2(file, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    if "--save" in argv:
        from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

        get_write_results_queue("fork")  # by default a new interpreter, which imports torch again
    if argv[0].endswith(".py"):
        sys.path.insert(0, str(Path(argv[0]).parent))
        runpy.run_path(argv[0], run_name="__main__")
    else:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
