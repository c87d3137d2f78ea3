"""The MLflow server that `droptune mirror ui` starts, with the options that were measured."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from droptune.errors import UsageError
from droptune.mirror.tracking import MirrorError, Tracking

_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 8 processes fewer, 1 GB less
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}


@dataclass(frozen=True)
class Server:
    """How to serve a local MLflow database. One worker: with more, each request takes 40 ms
    longer (no TCP_NODELAY on the shared socket), and 500 MB are enough instead of 3 GB."""

    tracking: Tracking
    host: str = "127.0.0.1"
    port: int = 5000
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tracking.is_server:
            raise UsageError(f"{self.tracking.redacted} is a server already: open it in a browser")

    @property
    def address(self) -> str:
        """What a browser on this machine opens."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{host}:{self.port}"

    def command(self) -> list[str]:
        """The command line; the database's address, which may hold a password, is not in it."""
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", self.host, "--port", str(self.port)]
        if self.tracking.artifacts is not None:
            command += ["--default-artifact-root", str(self.tracking.artifacts)]
        if hosts := self._hosts():
            command += ["--allowed-hosts", ",".join(hosts)]
        return command

    def environment(self) -> Mapping[str, str]:
        backend = {"MLFLOW_BACKEND_STORE_URI": self.tracking.uri}
        return {**os.environ, **_ENVIRONMENT, **backend}

    def _hosts(self) -> list[str]:
        """Names the server answers to: MLflow refuses any other host name with 403."""
        if self.host in ("127.0.0.1", "localhost") and not self.allowed_hosts:
            return []
        names = ["localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn()]
        names += list(self.allowed_hosts)
        return list(dict.fromkeys(form for name in names for form in (name, f"{name}:*")))

    def start(self, *options: str, log: int | None = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Start it and return once it answers; MirrorError where it ends instead.

        `options` are further ones of `mlflow server`, `log` the file descriptor for its output.
        """
        if not port_is_free(self.host, self.port):
            raise MirrorError(f"port {self.port} is in use: give another one with --port")
        process = subprocess.Popen(
            [*self.command(), *options], env=dict(self.environment()), stdout=log, stderr=log
        )
        try:
            self._wait(process)
        except BaseException:
            stop(process)
            raise
        return process

    def _wait(self, process: subprocess.Popen[bytes], seconds: float = 300.0) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if process.poll() is not None:
                raise MirrorError(
                    f"the MLflow server ended with exit code {process.returncode}: "
                    f"run `{' '.join(self.command())}` to see why"
                )
            if _healthy(self.address):
                return
            time.sleep(0.2)
        raise MirrorError(f"the MLflow server did not answer within {seconds:.0f} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and wait for it."""
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def port_is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
