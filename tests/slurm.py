"""A real one-node Slurm for tests: munged, slurmctld and slurmd of this machine's packages.

It installs nothing. `missing()` says in one line why it cannot run here; `OneNodeSlurm` starts
the daemons below a folder of its own (own munge socket and key, own ports, fake GPUs) and stops
them again. Needs root, and Debian's `slurm-wlm` and `munge`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

CONFIGURATION = """\
ClusterName=droptune
SlurmctldHost={node}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait={kill_wait}
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
SlurmdParameters=config_overrides
{controller_parameters}
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
NodeName={node} NodeAddr=127.0.0.1 CPUs=8 Sockets=1 CoresPerSocket=8 ThreadsPerCore=1 \
RealMemory=8000 Gres=gpu:fake:4 State=UNKNOWN
PartitionName=low Nodes={node} Default=YES MaxTime=1:00:00 State=UP PriorityTier=1 \
PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes={node} MaxTime=1:00:00 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no Slurm can be started on this machine; None where it can."""
    for program in ("munged", "slurmctld", "slurmd"):
        if shutil.which(program, path=_path()) is None:
            return f"{program} is not installed (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "starting a Slurm needs root"


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


class OneNodeSlurm:
    """One cluster of one node with 8 CPUs and 4 GPUs that exist as device files only.

    Partitions: `low` (default; preempted jobs are requeued after `grace` seconds) and `high`.
    With `user_signal`, preemption sends the signal of `--signal` first.
    """

    def __init__(
        self, folder: Path, *, grace: int = 8, kill_wait: int = 10, user_signal: bool = False
    ) -> None:
        self.folder = folder
        self.node = socket.gethostname()
        self._waiting: dict[str, float] = {}
        parameters = "SlurmctldParameters=preempt_send_user_signal" if user_signal else ""
        self._values = {
            "folder": folder,
            "node": self.node,
            "controller_port": _free_port(),
            "node_port": _free_port(),
            "grace": grace,
            "kill_wait": kill_wait,
            "controller_parameters": parameters,
        }

    @property
    def environment(self) -> dict[str, str]:
        """What `sbatch`, `squeue` and `scontrol` need to find this cluster."""
        configuration = self.folder / "etc" / "slurm.conf"
        return {**os.environ, "PATH": _path(), "SLURM_CONF": str(configuration)}

    def start(self) -> OneNodeSlurm:
        """Start all daemons and wait until the node is idle."""
        for name in ("etc", "state", "spool", "log", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write_configuration()
        self._start_munge()
        self._start("slurmctld", "-f", self.environment["SLURM_CONF"])
        self._start("slurmd", "-f", self.environment["SLURM_CONF"], "-N", self.node)
        self.wait(lambda: self.run("sinfo", "-h", "-p", "low", "-o", "%t") == "idle", 30)
        return self

    def stop(self) -> None:
        """Cancel what runs and stop the daemons that `start` started."""
        self.run("scancel", "--user=root", check=False)
        self.wait(lambda: not self.run("squeue", "-h", check=False), 40, strict=False)
        for name in ("slurmd", "slurmctld", "munged"):
            self._kill(self.folder / f"{name}.pid")

    def jobs(self) -> dict[str, str]:
        """State of every job that Slurm still knows by its name (`7_0`), finished ones too."""
        output = self.run("squeue", "-h", "-r", "-t", "all", "-o", "%i %T")
        return dict(line.split() for line in output.splitlines())

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a Slurm client."""
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr}")
        return result.stdout.strip()

    def wait(self, condition, seconds: float, *, strict: bool = True) -> None:
        """Until `condition()` is true; jobs that were requeued meanwhile start at once."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.start_requeued()
            if time.monotonic() > deadline:
                if strict:
                    raise TimeoutError(self.run("scontrol", "show", "job", check=False))
                return
            time.sleep(0.2)

    def start_requeued(self) -> None:
        """Let requeued jobs start soon: Slurm makes them wait two minutes.

        Not at once: a job that starts again before its last run is cleaned up fails.
        """
        listed = self.run("squeue", "-h", "-r", "-t", "PD", "-o", "%i %r", check=False)
        waiting = [line.split()[0] for line in listed.splitlines() if line.endswith("BeginTime")]
        self._waiting = {job: self._waiting.get(job, time.monotonic()) for job in waiting}
        for job, since in self._waiting.items():
            if time.monotonic() > since + 2:
                self.run("scontrol", "update", f"jobid={job}", "starttime=now", check=False)

    def _write_configuration(self) -> None:
        etc = self.folder / "etc"
        (etc / "slurm.conf").write_text(CONFIGURATION.format(**self._values))
        (etc / "cgroup.conf").write_text("CgroupAutomount=no\n")
        for index in range(4):
            os.mknod(self.folder / "dev" / f"nvidia{index}", 0o20666, os.makedev(195, index))
        devices = f"File={self.folder}/dev/nvidia[0-3] Flags=nvidia_gpu_env"
        (etc / "gres.conf").write_text(f"NodeName={self.node} Name=gpu Type=fake {devices}\n")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        names = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]
        self._start("munged", "--force", f"--key-file={key}", *files)
        (self.folder / "munge.pid").rename(self.folder / "munged.pid")

    def _start(self, *command: str) -> None:
        log = self.folder / "log" / f"{command[0]}.out"
        with log.open("w") as output:
            subprocess.run(
                command, env=self.environment, stdout=output, stderr=output, timeout=60, check=True
            )

    def _kill(self, pid_file: Path) -> None:
        if not pid_file.exists():
            return
        pid = int(pid_file.read_text())
        try:
            os.kill(pid, 15)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + 10
        while _running(pid) and time.monotonic() < deadline:
            time.sleep(0.05)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
