"""A real SLURM of one node with two CPUs, in a temporary folder: nothing else on the machine is.

    with slurm.cluster() as environment:
        subprocess.run(["sbatch", "--wait", "run.sh", "fig4"], env=environment)

A job in the partition `urgent` preempts those in `usual`, the default, which are then queued again.
"""

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = f"{os.environ['PATH']}:/usr/sbin"  # where daemons are, which not every PATH has
# No cgroups, no accounting, no service manager; what waits for a minute elsewhere waits seconds.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
SlurmdParameters=config_overrides
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=usual Nodes=node Default=YES PriorityTier=1
PartitionName=urgent Nodes=node PriorityTier=2
"""


def missing() -> list[str]:
    """Programs of SLURM that are not installed."""
    return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Start the daemons; yields the environment in which sbatch and the others find them.

    Raises:
        RuntimeError: the node does not come up, with what the daemons said.
    """
    # Not in pytest's folder: the path of a socket has at most 107 characters.
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
        host, ports = socket.gethostname().split(".")[0], free_ports(2)
        settings = {"folder": folder, "host": host, "ports": ports, "user": getpass.getuser()}
        (folder / "slurm.conf").write_text(CONFIG.format(**settings))
        # Loaded in any case, but then used for nothing; 22.05 has no "disabled".
        (folder / "cgroup.conf").write_text(
            f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\n"
        )
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        environment = kept | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        output = stack.enter_context(open(folder / "output", "w"))
        for command in (
            ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files],
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D", "-N", "node"],
        ):
            options = {"env": environment, "stdout": output, "stderr": subprocess.STDOUT}
            stack.callback(end, subprocess.Popen(command, **options))
            if command[0] == "munged":
                wait(lambda: (folder / "munge.socket").exists(), folder / "output")
        stack.callback(cancel_all, environment)
        idle = ["sinfo", "--noheader", "--partition=usual", "--format=%T"]
        wait(lambda: ask(environment, *idle) == "idle", folder / "output")
        yield environment


def ask(environment: dict[str, str], *command: str) -> str:
    """What a command prints, also where it fails."""
    options = {"capture_output": True, "text": True, "check": False}
    return subprocess.run(command, env=environment, timeout=60, **options).stdout.strip()


def wait(condition, told: Path, seconds: int = 60) -> None:
    """Until it holds. Raises RuntimeError with the end of the file `told`."""
    for _ in range(10 * seconds):
        if condition():
            return
        time.sleep(0.1)
    raise RuntimeError(f"nothing happened for {seconds} s: {told.read_text()[-2000:]}")


def cancel_all(environment: dict[str, str]) -> None:
    """Jobs would outlive the daemons."""
    ask(environment, "scancel", f"--user={getpass.getuser()}", "--signal=KILL", "--full")
    ask(environment, "scancel", f"--user={getpass.getuser()}")
    with contextlib.suppress(RuntimeError):
        wait(lambda: not ask(environment, "squeue", "--noheader"), Path(os.devnull), 30)


def end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
