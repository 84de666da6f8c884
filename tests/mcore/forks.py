"""Our commands in processes forked from one that has imported them: imports take most of a short run.

What another program starts (torchrun, a script, Slurm) is a fork too in the environment `warm`, else an interpreter of its own.
"""

from __future__ import annotations

import ast
import atexit
import gc
import inspect
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn
from unittest import mock

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
    import megatron.core.tokenizers.text.models  # noqa: F401  with it transformers
    import torch.distributed.elastic.rendezvous.c10d_rendezvous_backend
    import torch.distributed.launcher.api
    import torch.utils.serialization.config  # noqa: F401
    from megatron.training import argument_utils
    from megatron.training.arguments import add_megatron_arguments
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    import megatron_lighthouse.launch.megatron
    import megatron_lighthouse.launch.restart
    import megatron_lighthouse.lighthouse.implementations
    import megatron_lighthouse.lighthouse.layer
    import megatron_lighthouse.lighthouse.packed.reference
    import megatron_lighthouse.lighthouse.sharded.deal
    import megatron_lighthouse.lighthouse.sharded.select
    import megatron_lighthouse.mcore.attention.hybrid_specs
    import megatron_lighthouse.mcore.loop.pretrain
    import megatron_lighthouse.plan.answer
    import megatron_lighthouse.plan.search
    import megatron_lighthouse.recipe.evaluation_plots
    import megatron_lighthouse.recipe.trained  # noqa: F401
    from tests.interpreter import quicken

    quicken()
    # Megatron reads the help of its flags in the source, each time
    inspect.getsource = cache(inspect.getsource)
    mock.patch.object(argument_utils, "ast", SimpleNamespace(**{**vars(ast), "parse": cache(ast.parse)})).start()
    add_megatron_arguments(ArgumentParser())
    # torchrun names what it logs by a look at its stack, for which each time it goes through all that is imported
    mock.patch.object(dynamic_rendezvous, "get_method_name", return_value="of torchrun").start()
    gc.freeze()  # what is imported is no garbage: a fork that looked would copy it
    listener, tests = socket.socket(fileno=int(sys.argv[1])), os.pidfd_open(int(sys.argv[2]))
    running: dict[int, tuple[int, socket.socket]] = {}  # by the file descriptor of each: its number, and who waits for it
    while tests not in (ready := select.select([listener, tests, *running, *(who for _, who in running.values())], [], [])[0]):
        if listener in ready:
            asking, _ = listener.accept()
            with suppress(ValueError):  # it was killed before it had asked
                _, (output, errors), _, _ = socket.recv_fds(asking, 1, 2)
                request = json.loads(asking.makefile().readline())
                if not (process := os.fork()):
                    request["environment"] |= installed
                    _go_where(asking)
                    _run(**request, output=output, errors=errors)
                with suppress(PermissionError):  # whichever of the two comes first
                    os.setpgid(process, process)
                os.close(output)
                os.close(errors)
                running[os.pidfd_open(process)] = process, asking
                _tell(asking, process)
        for ended, (process, asking) in list(running.items()):
            if ended in ready:
                _tell(asking, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
                del running[ended]
                asking.close()
                os.close(ended)
            elif asking in ready:  # who waits was killed
                with suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)
    for process, _ in running.values():  # the tests were killed
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


def _tell(asking: socket.socket, number: int) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):
        asking.sendall(f"{number}\n".encode())


def _go_where(asking: socket.socket) -> None:
    """The process that waits is: perhaps on a node of the emulated Slurm."""
    waiting, _, _ = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if os.readlink(f"/proc/{waiting}/ns/net") != os.readlink("/proc/self/ns/net"):
        os.setns(os.pidfd_open(waiting), os.CLONE_NEWNS | os.CLONE_NEWNET | os.CLONE_NEWUTS)


def _run(argv: list[str], environment: dict[str, str], folder: str, output: int, errors: int) -> NoReturn:
    os.setpgid(0, 0)
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, errors)):
        os.dup2(file, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    status = 1
    try:
        if "--save" in argv or ("--run-folder" in argv and "pretrain" in argv[0]):
            from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

            get_write_results_queue("fork")  # by default a new interpreter, which imports torch again
        if argv[0].endswith(".py"):
            sys.path.insert(0, str(Path(argv[0]).parent))
            runpy.run_path(argv[0], run_name="__main__")
        else:
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    # all that an interpreter does at its end but to take apart what is imported, which a fork would copy for it
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 255)


if __name__ == "__main__":
    _serve()
