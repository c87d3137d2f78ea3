"""What Kubernetes would refuse, or do otherwise than meant, and its schemas do not say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


def problems(manifest: dict[str, Any]) -> list[str]:
    """One line for each problem of one manifest; [] for a good one."""
    return list(_problems(manifest))


def action(job: dict[str, Any], exit_code: int, *conditions: str) -> str:
    """What a Job's podFailurePolicy does with a pod that ended so: its first rule that fits."""
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes and (exit_code in codes["values"]) == (codes["operator"] == "In"):
            return rule["action"]
        if {pattern["type"] for pattern in rule.get("onPodConditions", [])} & set(conditions):
            return rule["action"]
    return "Count"


def _problems(manifest: dict[str, Any]) -> Iterator[str]:
    name = manifest["metadata"]["name"]
    if not LABEL.fullmatch(name) or len(name) > 63:
        yield f"{name!r} is no DNS label"
    if manifest["kind"] == "Job":
        yield from _job(manifest["spec"])
    pod = manifest.get("spec", {}).get("template", {}).get("spec")
    if pod is not None:
        claims = manifest["spec"].get("volumeClaimTemplates", [])
        yield from _pod(pod, {claim["metadata"]["name"] for claim in claims})
    if manifest["kind"] in ("Deployment", "StatefulSet"):
        selected = manifest["spec"]["selector"]["matchLabels"]
        labels = manifest["spec"]["template"]["metadata"]["labels"]
        if not selected.items() <= labels.items():
            yield f"the selector {selected} does not match the pods' {labels}"


def _job(spec: dict[str, Any]) -> Iterator[str]:
    pod = spec["template"]["spec"]
    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        yield "restartPolicy of a Job has to be Never or OnFailure"
    if "podFailurePolicy" in spec and pod.get("restartPolicy") != "Never":
        yield "podFailurePolicy needs restartPolicy: Never"
    if spec.get("completionMode") == "Indexed" and spec["completions"] != spec["parallelism"]:
        yield "completions and parallelism differ: some workers would wait for others to end"
    containers = {container["name"] for container in pod["containers"]}
    for rule in spec.get("podFailurePolicy", {}).get("rules", []):
        if rule["action"] == "FailIndex" and spec.get("backoffLimitPerIndex") is None:
            yield "FailIndex needs backoffLimitPerIndex"
        codes = rule.get("onExitCodes", {})
        if codes.get("containerName", next(iter(containers))) not in containers:
            yield f"a rule names the container {codes['containerName']!r}, which is not there"
        if codes.get("operator") == "In" and 0 in codes["values"]:
            yield "exit code 0 is no failure"


def _pod(pod: dict[str, Any], claimed: set[str]) -> Iterator[str]:
    volumes = claimed | {volume["name"] for volume in pod.get("volumes") or []}
    if not pod.get("securityContext", {}).get("runAsNonRoot"):
        yield "the pod may run as root"
    for container in pod["containers"]:
        yield from _container(container, volumes)


def _container(container: dict[str, Any], volumes: set[str]) -> Iterator[str]:
    if ":" not in container["image"].rpartition("/")[2] or container["image"].endswith(":latest"):
        yield f"image {container['image']} is not pinned"
    names = [entry["name"] for entry in container.get("env", [])]
    if len(set(names)) < len(names):
        yield "a variable is set twice"
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            yield f"no volume {mount['name']!r}"
    resources = container.get("resources", {})
    for kind in ("requests", "limits"):
        for resource, amount in resources.get(kind, {}).items():
            if not QUANTITY.fullmatch(str(amount)):
                yield f"{kind} {resource}: {amount} is no quantity"
            if "/" in resource and not str(amount).isdigit():
                yield f"{kind} {resource}: {amount} is no whole number"
    if "memory" not in resources.get("limits", {}):
        yield "no memory limit"
