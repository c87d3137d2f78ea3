"""The Kubernetes launcher: its manifest, by schema and by meaning, and how it is applied."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from manifests import problems

from droptune.errors import DroptuneError, LaunchError
from droptune.launch import Order, make_launcher
from droptune.launch.kubernetes import KubernetesLauncher

URL = "postgresql://somebody:hunter2@db/trials"
EXAMPLE = Path(__file__).parents[2] / "docker" / "kubernetes" / "worker.yaml"
HOSTILE = "-x: \"q\" 'a' $(HOME) # {{ 7 }} \\ é😀\n  image: evil\x85\u2028\x07"

KUBECTL = """
import json, os, sys
if os.environ.get("REFUSE"):
    sys.exit('error: jobs.batch is forbidden: User "somebody" cannot create resource')
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps([sys.argv[1:], sys.stdin.read()]) + "\\n")
"""


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """A stand-in for kubectl on PATH; returns the file that it writes its notes to."""
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable} -IS\n{KUBECTL}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    return tmp_path / "notes"


def order(**values):
    return Order(**{"study": "digits", "project": Path("/here"), "storage": URL, **values})


def launcher(**settings):
    return KubernetesLauncher(**{"image": "registry.example.org/droptune-worker:1", **settings})


def manifest(given: Order, **settings) -> dict:
    return yaml.safe_load(launcher(**settings).manifest(given))


def container(job: dict) -> dict:
    (only,) = job["spec"]["template"]["spec"]["containers"]
    return only


def environment(job: dict) -> dict:
    return {entry["name"]: entry for entry in container(job)["env"]}


VARIANTS = {
    "plain": ({}, {}),
    "cpu": ({"device": "cpu", "workers": 50}, {}),
    "hostile": ({"study": HOSTILE}, {}),
    "everything": (
        {"workers": 8, "width": "16", "tracking": "http://mlflow:5000"},
        {
            "volume": "project",
            "queue": "team-a",
            "secret": "database",
            "python": "/opt/venv/bin/python",
            "setup": ("source /opt/env.sh",),
            "gpu_resource": "nvidia.com/mig-1g.10gb",
        },
    ),
}


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_manifests_are_valid(variant, version):
    values, settings = VARIANTS[variant]
    job = manifest(order(**values), **settings)
    kubernetes_validate.validate(job, version, strict=True)
    assert problems(job) == []


def test_the_example_is_what_the_launcher_writes():
    """docker/kubernetes/worker.yaml, to be read by people, is the recorded text."""
    given = order(workers=4, tracking="http://mlflow:5000", tag="20260101-120000-abcd")
    settings = {"image": "droptune-worker:0.1.0", "secret": "droptune-storage"}
    assert launcher(**settings).manifest(given) == EXAMPLE.read_text()


def test_without_an_mlflow_server_workers_mirror_nothing():
    assert environment(manifest(order()))["DROPTUNE_MIRROR"]["value"] == "none"
    with_server = environment(manifest(order(tracking="http://mlflow:5000")))
    assert "DROPTUNE_MIRROR" not in with_server


def test_workers_are_indices_of_one_job():
    job = manifest(order(workers=7))
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 7


def test_exit_codes_mean_what_they_mean_to_the_worker():
    rules = manifest(order())["spec"]["podFailurePolicy"]["rules"]
    by_code = {}
    for rule in rules:
        for code in rule.get("onExitCodes", {}).get("values", []):
            by_code.setdefault(code, rule["action"])
    assert by_code[78] == "FailIndex"
    assert by_code[75] == "Ignore"
    assert rules[1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert rules[-1]["action"] == "Count"
    assert manifest(order(), restarts=9)["spec"]["backoffLimitPerIndex"] == 9


def test_the_database_url_comes_from_a_secret_only(kubectl):
    text = launcher().describe(order())
    assert "hunter2" not in text
    job = yaml.safe_load(text)
    (volume,) = [v for v in job["spec"]["template"]["spec"]["volumes"] if "secret" in v]
    (mount,) = [m for m in container(job)["volumeMounts"] if m["name"] == volume["name"]]
    assert environment(job)["DROPTUNE_STORAGE_FILE"]["value"] == f"{mount['mountPath']}/url"
    assert mount["readOnly"]


def test_a_worker_knows_its_job_and_its_share_of_the_cores():
    given = order()
    env = environment(manifest(given))
    assert env["DROPTUNE_JOB"]["value"] == f"kubernetes {given.job_name}/$(JOB_COMPLETION_INDEX)"
    names = list(env)
    assert names.index("JOB_COMPLETION_INDEX") < names.index("DROPTUNE_JOB")
    assert env["POD_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    resource = env["OMP_NUM_THREADS"]["valueFrom"]["resourceFieldRef"]
    assert resource == {"containerName": "worker", "resource": "limits.cpu"}


def test_gpus_are_asked_for_unless_on_the_cpu():
    with_gpu, without = manifest(order()), manifest(order(device="cpu"))
    assert container(with_gpu)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia" not in json.dumps(without)
    assert "cuda" in container(with_gpu)["args"]
    assert container(without)["args"][-4:] == ["--device", "cpu", "--", "digits"]


def test_hostile_names_are_words_only():
    job = manifest(order(study=HOSTILE))
    words = container(job)["args"]
    assert words[-1].replace("$$(", "$(") == HOSTILE  # Kubernetes undoes the doubling
    assert not re.search(r"(?<!\$)\$\(", words[-1])
    assert job["metadata"]["annotations"]["droptune/study"] == HOSTILE
    assert container(job)["image"] == "registry.example.org/droptune-worker:1"


@pytest.mark.parametrize("study", ["Ünï code", "_" * 70, "9", "a" * 500, "日本", "A.b_C"])
def test_job_names_are_dns_labels_with_room_for_the_pods_suffix(study):
    name = manifest(order(study=study))["metadata"]["name"]
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
    assert len(f"{name}-9999-abcde") <= 63


def test_names_of_launches_differ():
    assert order().job_name != order().job_name


def test_setup_lines_and_another_python_replace_the_entry_point():
    plain = container(manifest(order()))
    prepared = container(manifest(order(), setup=("module load cuda",)))
    other = container(manifest(order(), python="/opt/python"))
    assert "command" not in plain
    assert plain["args"][:2] == ["worker", "start"]
    assert prepared["command"] == ["bash"]
    assert "module load cuda" in prepared["args"][1]
    assert prepared["args"][3:6] == ["python", "-m", "droptune"]
    assert other["command"] == ["/opt/python"]
    assert other["args"][:3] == ["-m", "droptune", "worker"]


def test_submitting_applies_the_secret_and_then_the_job(kubectl):
    given = order(workers=2, options=("--namespace=team", "--context=prod"))
    recorded = []
    launcher(options=("--request-timeout=30s",)).submit(given, recorded.extend)
    (secret_call, secret), (job_call, job) = map(json.loads, kubectl.read_text().splitlines())
    flags = ["--request-timeout=30s", "--namespace=team", "--context=prod"]
    assert secret_call == job_call == ["apply", "--filename=-", *flags]
    secret, job = json.loads(secret), yaml.safe_load(job)
    kubernetes_validate.validate(secret, "1.31", strict=True)
    assert secret["stringData"] == {"url": URL}
    (volume,) = [v for v in job["spec"]["template"]["spec"]["volumes"] if "secret" in v]
    assert volume["secret"]["secretName"] == secret["metadata"]["name"]
    assert [j.name for j in recorded] == [f"kubernetes {given.job_name}/{k}" for k in (0, 1)]


def test_a_secret_that_exists_is_left_alone(kubectl):
    launcher(secret="database").submit(order(), lambda jobs: None)
    ((_, job),) = map(json.loads, kubectl.read_text().splitlines())
    assert "hunter2" not in job
    assert 'secretName: "database"' in job


def test_a_refusal_is_told_in_its_own_words(kubectl, monkeypatch):
    monkeypatch.setenv("REFUSE", "1")
    with pytest.raises(DroptuneError, match=r"kubectl apply failed .* jobs\.batch is forbidden"):
        launcher().submit(order(), lambda jobs: pytest.fail("nothing started"))


def test_without_kubectl_the_dry_run_is_offered(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"kubectl is not on PATH: .* --dry-run"):
        launcher().submit(order(), lambda jobs: None)


def test_an_image_is_needed():
    with pytest.raises(LaunchError, match=r"build one from docker/worker\.Dockerfile"):
        KubernetesLauncher().describe(order())


def test_a_password_in_mlflows_address_is_not_shown_to_the_cluster():
    with pytest.raises(LaunchError, match="MLFLOW_TRACKING_USERNAME"):
        manifest(order(tracking="https://me:hunter2@mlflow:5000"))


def test_sqlite_is_refused():
    with pytest.raises(LaunchError, match="kubernetes starts workers on other machines"):
        make_launcher("kubernetes", {"image": "x"}, "sqlite+pysqlite:////srv/droptune.db")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("template", "spec", "restartPolicy", "Always"), "restartPolicy"),
        (("template", "spec", "containers", 0, "resources", "limits", "memory", "16GiB"), "16GiB"),
        (
            ("template", "spec", "containers", 0, "resources", "limits", "nvidia.com/gpu", "0.5"),
            "whole number",
        ),
        (("podFailurePolicy", "rules", 0, "onExitCodes", "containerName", "w"), "container"),
        (("backoffLimitPerIndex", None), "FailIndex"),
        (("template", "spec", "volumes", []), "no volume"),
        (("completions", 9), "parallelism"),
    ],
)
def test_what_schemas_do_not_see_is_seen(change, problem):
    job = manifest(order())
    *path, key, value = ("spec", *change)
    target = job
    for step in path:
        target = target[step]
    target[key] = value
    assert any(problem in found for found in problems(job)), problems(job)
