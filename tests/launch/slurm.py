"""A real Slurm on this machine: 4 nodes of 8 fake GPUs, in namespaces of its own, so that all of it ends with one process.

As a program it prints the Debian packages to install, or nothing where all programs are there.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

NODES = 4
PROGRAMS = ("unshare", "nsenter", "ip", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
"""Debian's, for the programs that a system without Slurm lacks."""

CONFIG = """
ClusterName=test
SlurmctldHost=head(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5,requeue_delay=0,sched_min_interval=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
JobRequeue=1
KillWait=5
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName=node{k} NodeHostname=node{k} NodeAddr=127.0.0.{address} Port={port} Sockets=2 CoresPerSocket=32 "
    "RealMemory=1000000 Gres=gpu:b200:8"
)

START = r"""
set -e
hostname head
mount --bind {root}/hosts /etc/hosts
ip link set lo up
ip link add bridge0 type bridge && ip address add 10.123.0.1/24 dev bridge0 && ip link set bridge0 up
munged --force --socket={root}/munge/munge.sock --key-file={root}/munge/key --pid-file={root}/munge/pid \
    --log-file={root}/munge/log --seed-file={root}/munge/seed
export SLURM_CONF={root}/slurm.conf
slurmctld
for k in {numbers}; do
    unshare -m -u bash -c "hostname node$k; exec slurmd -N node$k"
done
touch {root}/started
sleep infinity & wait  # not exec: bash reaps what ranks leave behind
"""


def absent() -> list[str]:
    """The programs that are not there."""
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if not shutil.which(name, path=search)]


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if programs := absent():
        return f"no {', '.join(programs)}: apt-get install --no-install-recommends {PACKAGES}, as docs/development.md says"
    if os.geteuid():
        return "an emulated Slurm needs root"
    probe = subprocess.run(
        ["unshare", "-pmnu", "--fork", "ip", "link", "add", "bridge0", "type", "bridge"], capture_output=True
    )
    return f"unshare -pmn: {probe.stderr.decode().strip()}" if probe.returncode else None


class Slurm:
    """A running cluster. `stop` ends every process of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("munge", "state", "spool", "dev"):
            (root / folder).mkdir()
        (root / "munge").chmod(0o700)
        (root / "munge" / "key").write_bytes(os.urandom(128))
        (root / "munge" / "key").chmod(0o400)
        for k in range(8):
            (root / "dev" / f"nvidia{k}").symlink_to("/dev/null")
        numbers = range(1, NODES + 1)
        nodes = "\n".join(NODE.format(k=k, address=10 + k, port=17000 + k) for k in numbers)
        (root / "slurm.conf").write_text(CONFIG.format(root=root, nodes=nodes))
        (root / "gres.conf").write_text(f"NodeName=node[1-{NODES}] Name=gpu Type=b200 File={root}/dev/nvidia[0-7]\n")
        hosts = "".join(f"127.0.0.{10 + k} node{k}\n" for k in numbers)
        (root / "hosts").write_text(f"127.0.0.1 localhost head\n{hosts}")
        script = START.format(root=root, numbers=" ".join(map(str, numbers)))
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        self.environment = {**os.environ, "SLURM_CONF": f"{root}/slurm.conf", "PATH": path}
        self.environment.pop("PYTHON", None)  # it would win over a cluster file's
        with (root / "start.log").open("w") as log:
            self.process = subprocess.Popen(
                ["unshare", "-pmnu", "--mount-proc", "--fork", "--kill-child", "bash", "-c", script],
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        self._wait_until_up()

    def _wait_until_up(self) -> None:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            if (self.root / "started").exists() and self.run("scontrol", "show", "node").stdout.count(
                "SlurmdStartTime=2"
            ) == NODES:
                return
            time.sleep(0.1)
        logs = "\n".join(log.read_text(errors="replace")[-1000:] for log in self.root.glob("*.log"))
        self.stop()
        raise RuntimeError(f"the emulated Slurm did not start:\n{logs}")

    def stop(self) -> None:
        """SIGKILL for the namespace's first process, with which the kernel ends the others."""
        self.process.kill()
        self.process.wait()

    def _init(self) -> int:
        """The number that the namespace's first process has out here."""
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0])

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command on the head node."""
        inside = ["nsenter", "-t", str(self._init()), "-m", "-n", "-p", "-u", "--wd=" + str(cwd or Path.cwd()), *command]
        environment = {**self.environment, **variables}
        return subprocess.run(inside, env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, …"""
        text = self.run("scontrol", "show", "job", job).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job: str, seconds: float = 400) -> dict[str, str]:
        """The state of a job when it has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            state = self.state(job)
            if state["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                return state
            time.sleep(0.3)
        raise AssertionError(f"job {job} did not end within {seconds} s: {self.state(job)}")

    def ranks(self) -> dict[int, int]:
        """The processes of the ranks that train, seen from out here: rank to process."""
        found = {}
        namespace = os.readlink(f"/proc/{self._init()}/ns/pid")
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if b"megatron_lighthouse.pretrain_gpt" not in (folder / "cmdline").read_bytes().split(b"\0"):
                    continue
                if os.readlink(folder / "ns/pid") != namespace:
                    continue
                words = (folder / "environ").read_bytes().decode().split("\0")
                name = os.readlink(folder / "exe")
            except (OSError, ValueError):
                continue
            environment = dict(word.split("=", 1) for word in words if "=" in word)
            if "RANK" in environment and "python" in name:
                rank, process = int(environment["RANK"]), int(folder.name)
                found[rank] = min(process, found.get(rank, process))  # its data loaders came later
        return found


def go_on(process: int, number: signal.Signals) -> None:
    """Let a stopped process go on once a signal waits for it."""
    with suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text()
        waiting = next(line for line in status.splitlines() if line.startswith("ShdPnd:"))
        if int(waiting.split()[1], 16) >> (number - 1) & 1:
            os.kill(process, signal.SIGCONT)


if __name__ == "__main__":
    print(PACKAGES if absent() else "")
