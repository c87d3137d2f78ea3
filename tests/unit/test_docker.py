"""docker/: images, compose file and manifests are well formed and speak of droptune as it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import compose_spec
import kubernetes_validate
import pytest
import yaml
from manifests import problems
from typer.main import get_command

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
MANIFESTS = sorted((DOCKER / "kubernetes").glob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
WORKER, SERVER = ((DOCKER / f"{name}.Dockerfile").read_text() for name in ("worker", "server"))
COMPOSE_TEXT = (DOCKER / "compose.yaml").read_text()


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load(COMPOSE_TEXT)


def documents() -> list[dict]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


def instructions(text: str, name: str) -> list[str]:
    joined = text.replace("\\\n", " ")
    return [line[len(name) :].strip() for line in joined.splitlines() if line.startswith(name)]


def with_defaults(text: str) -> str:
    """`${NAME:-default}` as it is where NAME is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


# -- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(path):
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([hadolint, path], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("text", [WORKER, SERVER], ids=["worker", "server"])
def test_images_run_under_tini_and_not_as_root(text):
    assert json.loads(instructions(text, "ENTRYPOINT")[-1])[:2] == ["tini", "--"]
    assert instructions(text, "USER")[-1] == "10001:10001"
    assert instructions(text, "STOPSIGNAL") == ["SIGTERM"]
    assert "tini" in text[text.index("apt-get install") :]
    json.loads(instructions(text, "CMD")[-1])  # exec form: a shell would swallow the signals


def test_the_worker_image_takes_torch_from_the_index_that_is_asked_for():
    assert 'ARG TORCH_INDEX_URL=""' in WORKER
    (line,) = [line for line in instructions(WORKER, "RUN") if line.endswith(" torch")]
    script = line.replace("pip install", "printf '%s|'")
    words = {
        url: subprocess.run(
            ["sh", "-c", script], env={**os.environ, "TORCH_INDEX_URL": url}, capture_output=True
        ).stdout.decode()
        for url in ("", "https://index.example.org/cpu")
    }
    assert words[""] == "--constraint|constraints.txt|torch|"
    assert (
        "--index-url|https://index.example.org/cpu|torch|" in words["https://index.example.org/cpu"]
    )


def test_the_build_context_is_what_the_image_copies():
    ignored = (DOCKER / "worker.Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    lines = [line for line in instructions(WORKER, "COPY") if "--from" not in line]
    copied = {word.removeprefix("./") for line in lines for word in line.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in allowed)
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {name.split(".")[0] for name in setuptools["packages"]}
    assert folders | set(setuptools["package-dir"].values()) <= copied  # or pip cannot build
    server = (DOCKER / "server.Dockerfile.dockerignore").read_text().splitlines()
    assert [line[1:] for line in server if line.startswith("!")] == ["mlflow-server.sh"]


def test_the_server_has_the_mlflow_that_is_tested_here():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert f"mlflow=={pins['mlflow']}" in SERVER
    assert f"psycopg[binary]=={pins['psycopg']}" in SERVER


@pytest.mark.parametrize("path", sorted(DOCKER.glob("*.sh")), ids=lambda path: path.stem)
def test_scripts_are_executable_and_well_formed(path):
    assert os.access(path, os.X_OK)
    assert subprocess.run(["sh", "-n", path]).returncode == 0


# -- compose --------------------------------------------------------------------------------------


def test_compose_is_valid_to_the_specification(compose):
    compose_spec.ComposeSpecification.model_validate(compose)
    # The stricter of the two checkers knows neither merge keys nor variables
    plain = yaml.safe_dump(yaml.safe_load(with_defaults(COMPOSE_TEXT)))
    compose_spec.PyCompose.from_yaml(plain).validate()


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="no docker-compose here")
def test_compose_is_valid_to_docker_compose(tmp_path):
    command = ["docker-compose", "-f", DOCKER / "compose.yaml", "config", "-q"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


def test_images_are_tagged_with_the_versions_they_hold(compose):
    services = compose["services"]
    assert services["worker-gpu"]["image"] == f"droptune-worker:{VERSION}"
    assert f"mlflow=={services['mlflow']['image'].partition(':')[2]}" in SERVER
    for document in documents():
        for container in pod_of(document).get("containers", []):
            if container["image"].startswith("droptune-worker"):
                assert container["image"] == f"droptune-worker:{VERSION}"
            if container["image"].startswith("droptune-mlflow"):
                assert container["image"] == services["mlflow"]["image"]


def test_gpu_workers_and_their_twin_differ_in_the_device_only(compose):
    gpu, cpu = compose["services"]["worker-gpu"], compose["services"]["worker-cpu"]
    assert gpu["profiles"] == ["gpu"]
    assert cpu["profiles"] == ["cpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    same = ("image", "build", "environment", "secrets", "volumes", "depends_on", "user", "restart")
    assert all(gpu[key] == cpu[key] for key in same)


def test_services_start_when_what_they_need_is_healthy(compose):
    services = compose["services"]
    for service in services.values():
        for name, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "healthcheck" in services[name]


def test_no_secret_is_written_into_the_files(compose):
    text = "".join(path.read_text() for path in (*MANIFESTS, DOCKER / "compose.yaml"))
    assert not re.search(r"://[^/\s:@]+:[^/\s@]+@", text)
    for service in compose["services"].values():
        for key in service.get("environment", {}):
            assert "PASSWORD" not in key or key.endswith("_FILE")
    used = {name for s in compose["services"].values() for name in s.get("secrets", [])}
    assert used == set(compose["secrets"])


def test_mlflow_lets_workers_in_by_its_name(compose):
    """The server answers a Host that it does not know with 403, and clients do not try again."""
    options = compose["services"]["mlflow"]["command"]
    (hosts,) = [o.partition("=")[2].split(",") for o in options if o.startswith("--allowed-hosts")]
    address = compose["services"]["worker-gpu"]["environment"]["MLFLOW_TRACKING_URI"]
    name = address.removeprefix("http://").partition(":")[0]
    assert name in compose["services"]
    assert {name, f"{name}:*", "localhost:*"} <= set(hosts)


def test_mlflow_lets_in_whoever_forwards_its_port():
    """`kubectl port-forward` prints 127.0.0.1."""
    manifest = (DOCKER / "kubernetes" / "mlflow.yaml").read_text()
    (hosts,) = re.findall(r"--allowed-hosts=(\S+)", manifest)
    assert {"localhost:*", "127.0.0.1:*"} <= set(hosts.split(","))


def test_variables_in_compose_are_read_by_somebody(compose):
    source = "".join(path.read_text() for path in (ROOT / "droptune").rglob("*.py"))
    known = {"HOME", "POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD_FILE"}
    scripts = "".join(path.read_text() for path in DOCKER.glob("*.sh"))
    for service in compose["services"].values():
        for name in set(service.get("environment", {})) - known:
            assert name in source + scripts


def parse(words: list[str]) -> None:
    """Raise unless the command line takes these words."""
    from droptune.cli import app

    command, left = get_command(app), list(words)
    while hasattr(command, "commands"):
        command = command.commands[left.pop(0)]
    context = command.make_context(command.name, left)
    assert not context.args


def test_commands_in_images_compose_and_manifests_exist(compose):
    parse(json.loads(instructions(WORKER, "CMD")[-1]))
    for service in ("worker-gpu", "worker-cpu"):
        words = [
            re.sub(r"\$\{\w+:-(\w+)\}", r"\1", w) for w in compose["services"][service]["command"]
        ]
        parse(words)
    (job,) = [document for document in documents() if document["kind"] == "Job"]
    parse(job["spec"]["template"]["spec"]["containers"][0]["args"])


def test_secrets_are_made_once_and_fit_each_other(tmp_path):
    script = DOCKER / "make-secrets.sh"
    for _ in range(2):
        subprocess.run([script, tmp_path / "secrets", "postgres"], check=True, capture_output=True)
    folder = tmp_path / "secrets"
    password, storage, backend = (
        (folder / name).read_text()
        for name in ("postgres-password", "storage-url", "mlflow-backend-url")
    )
    assert re.fullmatch(r"[0-9a-f]{48}", password)
    assert storage == f"postgresql://droptune:{password}@postgres:5432/droptune"
    assert backend == f"postgresql+psycopg://droptune:{password}@postgres:5432/mlflow"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_compose_finds_the_secrets_where_they_are_made(compose, tmp_path):
    shutil.copy(DOCKER / "make-secrets.sh", tmp_path)
    subprocess.run([tmp_path / "make-secrets.sh"], check=True)
    assert all((tmp_path / secret["file"]).is_file() for secret in compose["secrets"].values())


# -- Kubernetes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_are_valid(path, version):
    for document in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(document, version, strict=True)
        assert problems(document) == []


def pod_of(document: dict) -> dict:
    return document.get("spec", {}).get("template", {}).get("spec", {})


def labels_of(document: dict) -> dict:
    return document["spec"]["template"]["metadata"]["labels"]


def test_services_and_policies_choose_pods_that_exist():
    pods = [labels_of(d) for d in documents() if "template" in d.get("spec", {})]
    selectors = [d["spec"]["selector"] for d in documents() if d["kind"] == "Service"]
    policies = [d["spec"] for d in documents() if d["kind"] == "NetworkPolicy"]
    selectors += [policy["podSelector"]["matchLabels"] for policy in policies]
    for selector in selectors:
        assert any(selector.items() <= labels.items() for labels in pods)
    chosen = {
        policy["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for policy in policies
    }
    assert chosen == {"postgres", "mlflow", "worker"}


def test_the_secrets_of_the_manifests_are_those_that_the_comments_make():
    text = "".join(path.read_text() for path in MANIFESTS)
    made = dict(re.findall(r"create secret generic (\S+) --from-file=(\w+)=secrets/", text))
    used = {
        volume["secret"]["secretName"]
        for document in documents()
        for volume in document.get("spec", {})
        .get("template", {})
        .get("spec", {})
        .get("volumes", [])
        if "secret" in volume
    }
    assert used == set(made)


def test_mlflow_answers_by_the_name_that_workers_use():
    (job,) = [d for d in documents() if d["kind"] == "Job"]
    env = job["spec"]["template"]["spec"]["containers"][0]["env"]
    address = next(e["value"] for e in env if e["name"] == "MLFLOW_TRACKING_URI")
    services = {d["metadata"]["name"]: d for d in documents() if d["kind"] == "Service"}
    name, port = address.removeprefix("http://").split(":")
    assert services[name]["spec"]["ports"][0]["port"] == int(port)
