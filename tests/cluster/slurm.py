"""A Slurm of one node on this machine, started for a test and stopped behind it: no systemd, no cgroups, no database.

Everything it writes lies in one folder, its ports are free ones, and it trusts a key of its own, so that it neither
needs nor disturbs a Slurm that is here already. The node claims two GPUs (device files that are always there), as
requests for them are what a test wants to see; nothing computes on them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
GPUS = ("/dev/null", "/dev/zero")
# Where daemons lie, which an ordinary PATH may leave out.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def lacking() -> list[str]:
    """Programs of Slurm and MUNGE that are not here."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Cluster:
    """munged, slurmctld and slurmd on this machine. The node can be killed like one that loses power, and come back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.conf = folder / "slurm.conf"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "PRUNELAB_"))},
            **{"SLURM_CONF": str(self.conf), "PATH": os.pathsep.join([str(folder / "bin"), PATH])},
        }

    def __enter__(self) -> Cluster:
        self._configure()
        try:
            self._start("munged", "--foreground", "--force", *self._munge_options())
            self._wait((self.folder / "munge.socket").exists, "munged")
            self._start("slurmctld", "-D", "-c")
            self.start_node()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_node()
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def start_node(self) -> None:
        """Boot the node; it takes work when this returns."""
        self._start("slurmd", "-D", "-N", _NODE)
        self._wait(lambda: self.query("sinfo", "--noheader", "--format=%T") in ("idle", "mixed", "allocated"), "node")

    def kill_node(self) -> None:
        """End the node's daemon and every process of its jobs at once, as a power cut does."""
        daemon = self.daemons.pop("slurmd", None)
        if daemon is None:
            return
        daemon.kill()
        daemon.wait()
        deadline = time.monotonic() + 20
        while processes := self._node_processes():
            assert time.monotonic() < deadline, f"processes of the node outlive it: {processes}"
            for process in processes:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)

    def query(self, *command: str) -> str:
        """What a client of this Slurm prints, or nothing where it cannot answer yet."""
        done = subprocess.run(command, env=self.environment, text=True, capture_output=True, check=False)
        return done.stdout.strip()

    def _configure(self) -> None:
        user = "root" if os.getuid() == 0 else os.environ["USER"]
        controller, node = _free_ports(2)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        for name in ("state", "spool", "bin"):
            (self.folder / name).mkdir()
        # Snakemake clears SLURM_* before it starts a job's step, and with it the place of a configuration of our own.
        wrapper = self.folder / "bin" / "srun"
        wrapper.write_text(f'#!/bin/sh\nSLURM_CONF={self.conf} exec {shutil.which("srun", path=PATH)} "$@"\n')
        wrapper.chmod(0o755)
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in GPUS))
        settings = {
            "ClusterName": "prunelab",
            "SlurmctldHost": f"{_HOST}(127.0.0.1)",
            "SlurmctldPort": controller,
            "SlurmdPort": node,
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.folder / 'munge.socket'}",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "slurmd.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "GresTypes": "gpu",
            "AccountingStorageType": "accounting_storage/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "ReturnToService": 2,
            "SlurmdTimeout": 10,
            "MinJobAge": 3600,
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        lines += [
            f"NodeName={_NODE} NodeHostname={_HOST} NodeAddr=127.0.0.1"
            f" CPUs={os.cpu_count()} RealMemory={memory} Gres=gpu:{len(GPUS)}",
            f"PartitionName=all Nodes={_NODE} Default=YES MaxTime=INFINITE State=UP",
        ]
        self.conf.write_text("\n".join(lines) + "\n")

    def _munge_options(self) -> list[str]:
        names = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        return [f"--{option}={self.folder / name}" for option, name in names.items()]

    def _start(self, program: str, *options: str) -> None:
        with (self.folder / f"{program}.log").open("ab") as log:
            self.daemons[program] = subprocess.Popen(
                # they end with the test, however it ends
                ["setpriv", "--pdeathsig", "KILL", program, *options],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not ready():
            logs = "\n".join(f"-- {p.name}\n{p.read_text()[-2000:]}" for p in self.folder.glob("*.log"))
            assert time.monotonic() < deadline, f"the {what} does not come up:\n{logs}"
            time.sleep(0.1)

    def _node_processes(self) -> list[int]:
        """Processes that this node started: its step daemons, and what runs in its jobs."""
        ours, found = f"SLURM_CONF={self.conf}", []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                name = (folder / "comm").read_text().strip()
            except OSError:  # it ended meanwhile, or is another user's
                continue
            if ours in environment and (name == "slurmstepd" or f"SLURMD_NODENAME={_NODE}" in environment):
                found.append(int(folder.name))
        return found


_HOST = socket.gethostname().partition(".")[0]
_NODE = "prunelab-node"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
