"""Workers as one Kubernetes Job, rendered as YAML and applied with the user's own kubectl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from droptune.errors import LaunchError
from droptune.launch.job import Job, Record
from droptune.launch.launcher import Launcher, need_program, render, run_engine
from droptune.launch.order import Order, shell_line, with_setup

URL_KEY = "url"


@dataclass(frozen=True)
class KubernetesLauncher(Launcher):
    """An Indexed Job; one GPU per pod unless `--device cpu`.

    `image` has droptune and the project in it, the project at `project` (or mounted there from
    the claim `volume`). `secret` names a Secret that exists and has the database URL under
    `url`; without it one is made for each launch. `python` is needed where the image has another
    entry point than docker/worker.Dockerfile. `queue` is a Kueue queue. `options` are given to
    kubectl before those of the command line.
    """

    name: ClassVar[str] = "kubernetes"

    image: str = ""
    project: str = "/work"
    volume: str = ""
    secret: str = ""
    python: str = ""
    queue: str = ""
    cpu: str = "4"
    memory: str = "16Gi"
    gpu_resource: str = "nvidia.com/gpu"
    options: tuple[str, ...] = ()

    def describe(self, order: Order) -> str:
        return f"# {shell_line(self._command(order))}\n{self.manifest(order)}"

    def submit(self, order: Order, record: Record) -> tuple[Job, ...]:
        manifest = self.manifest(order)
        need_program("kubectl", "install it")
        if not self.secret:
            secret = json.dumps(self._secret_manifest(order))
            run_engine(self._command(order), input=secret)
        run_engine(self._command(order), input=manifest)
        workers = range(order.workers or 1)
        jobs = tuple(Job(self.name, f"{order.job_name}/{k}", order.study, k) for k in workers)
        record(jobs)
        return jobs

    def manifest(self, order: Order) -> str:
        """The Job as YAML, with its reasons in comments."""
        if not self.image:
            raise LaunchError(
                "Kubernetes needs an image with droptune and your project: build one from "
                'docker/worker.Dockerfile and set image = "…" under [launch.kubernetes] in '
                "droptune.toml"
            )
        command, args = self._container(order)
        return render(
            "kubernetes.yaml.j2",
            job_name=order.job_name,
            study=order.study,
            workers=order.workers or 1,
            restarts=self.restarts,
            image=self.image,
            command=command,
            args=args,
            project=self.project,
            volume=self.volume,
            secret=self._secret(order),
            tracking=order.open_tracking(),
            gpu=order.on_gpu,
            gpu_resource=self.gpu_resource,
            cpu=self.cpu,
            memory=self.memory,
            queue=self.queue,
        )

    def _container(self, order: Order) -> tuple[list[str], list[str]]:
        """`command` ([] where the image's own entry point will do) and `args`.

        The entry point of docker/worker.Dockerfile is `tini -- droptune`.
        """
        device = "cuda" if order.on_gpu else order.device
        python = self.python or "python"
        whole = order.worker_command(python, self.project, device)
        # Kubernetes would replace $(NAME) in the arguments.
        escaped = [word.replace("$(", "$$(") for word in with_setup(self.setup, whole)]
        if self.setup or self.python:
            return escaped[:1], escaped[1:]
        return [], escaped[3:]

    def _secret(self, order: Order) -> str:
        return self.secret or order.job_name

    def _secret_manifest(self, order: Order) -> Mapping[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": self._secret(order)},
            "stringData": {URL_KEY: order.storage},
        }

    def _command(self, order: Order) -> tuple[str, ...]:
        return ("kubectl", "apply", "--filename=-", *self.options, *order.options)
