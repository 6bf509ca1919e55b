"""The Kubernetes manifests of examples/launch: schema, names that must agree, and the probes against a server."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from chord_megatron.config import load_config

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / "examples" / "launch" / "kubernetes"
MANIFESTS = pytest.mark.parametrize("path", sorted(DIRECTORY.glob("*.yaml")), ids=lambda path: path.name)


def documents(path: Path) -> dict[str, Any]:
    """The manifest's objects by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(path.read_text())}


@pytest.mark.parametrize("version", ["1.31", "1.34"])
@MANIFESTS
def test_manifests_follow_the_published_schema(path: Path, version: str):
    for document in documents(path).values():
        assert kubernetes_validate.validate(document, version, strict=True) == version
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**document, "specs": {}}, version, strict=True)


def test_the_pods_of_the_job_find_one_another():
    manifest = documents(DIRECTORY / "train.yaml")
    service, job = manifest["Service"], manifest["Job"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    name, subdomain = job["metadata"]["name"], service["metadata"]["name"]
    port = service["spec"]["ports"][0]["port"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == subdomain
    assert environment["RDZV_ENDPOINT"] == f"{name}-0.{subdomain}:{port}"
    assert {int(environment["NNODES"]), job["spec"]["parallelism"], job["spec"]["completions"]} == {2}
    assert int(environment["NPROC_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert container["command"] == ["examples/launch/elastic_nodes.sh"]
    load_config(str(ROOT / container["args"][0]), container["args"][1:])


@MANIFESTS
def test_shared_memory_is_large(path: Path):
    (workload,) = (document for kind, document in documents(path).items() if kind != "Service")
    pod = workload["spec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == mounts["/dev/shm"])
    assert volume["emptyDir"]["medium"] == "Memory"


@pytest.fixture
def health() -> Iterator[type[http.server.BaseHTTPRequestHandler]]:
    """A server on the manifest's port that answers `status` to those who know the token."""

    class Handler(http.server.BaseHTTPRequestHandler):
        status = 200

        def do_GET(self) -> None:
            known = self.headers["Authorization"] == "Bearer hunter2" and self.path == "/chord/health"
            self.send_response(self.status if known else 401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Handler.port = server.server_port  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Handler
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("token", "status", "healthy"), [("hunter2", 200, True), ("hunter2", 503, False), ("wrong", 200, False)]
)
def test_the_probes_ask_the_engine(health: Any, token: str, status: int, healthy: bool):
    (container,) = documents(DIRECTORY / "vllm.yaml")["Deployment"]["spec"]["template"]["spec"]["containers"]
    probes = [container[f"{name}Probe"]["exec"]["command"] for name in ("startup", "readiness", "liveness")]
    assert probes[0] == probes[1] == probes[2]
    assert container["ports"] == [{"name": "http", "containerPort": 8000}]
    health.status = status
    program = probes[0][2].replace(":8000/", f":{health.port}/")
    assert str(health.port) in program
    command = [sys.executable, probes[0][1], program]
    result = subprocess.run(command, env={**os.environ, "CHORD_SERVER_TOKEN": token}, capture_output=True)
    assert (result.returncode == 0) is healthy, result.stderr
