"""Replay a Dockerfile without Docker: its RUN lines, in a directory and a virtual environment of their own.

    python tools/replay_dockerfile.py docker/Dockerfile.cpu --directory NEW_DIR --check

What a base image brings stands in as packages that are installed first (--base), or in name only (--named): NVIDIA's
image is replayed with `--base torch==2.13.0 --named transformer-engine==2.16.0 --python python3.12`. As there, they
become pip's constraints (PIP_CONSTRAINT).

Replayed: ARG and ENV, WORKDIR, COPY (also between stages), RUN by bash, and with --check the HEALTHCHECK. Not replayed:
RUN lines that begin with a command for root (useradd, apt-get; it says so), USER, the base image itself. Paths in RUN
lines must be relative to WORKDIR. Without Docker, nothing keeps the commands from the rest of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[1]
NEEDS_ROOT = ("apt-get", "useradd")


@dataclass(frozen=True)
class Stage:
    """One FROM and what follows it."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # instruction, value


def read_stages(path: Path) -> list[Stage]:
    """The stages of a Dockerfile, in their order; ARGs before the first FROM are filled in."""
    with path.open("rb") as file:
        parser = DockerfileParser(fileobj=file, env_replace=False)
        structure = [
            (step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"
        ]
    defaults: dict[str, str] = {}
    stages: list[Stage] = []
    for instruction, value in structure:
        if instruction == "FROM":
            base, _, name = re.sub(r"\$\{(\w+)\}", lambda m: defaults[m[1]], value).partition(" AS ")
            stages.append(Stage(base, name or str(len(stages))))
        elif stages:
            stages[-1].steps.append((instruction, value))
        elif instruction == "ARG":
            name, _, default = value.partition("=")
            defaults[name] = default
    return stages


def needed(stages: list[Stage], target: str) -> list[Stage]:
    """The target and the stages that it is made from, as BuildKit picks them."""
    by_name = {stage.name: stage for stage in stages}
    wanted, names = [target], set()
    while wanted:
        stage = by_name[wanted.pop()]
        names.add(stage.name)
        sources = [stage.base, *(m[1] for i, v in stage.steps if i == "COPY" and (m := re.match(r"--from=(\S+)", v)))]
        wanted += [source for source in sources if source in by_name and source not in names]
    return [stage for stage in stages if stage.name in names]


class Replay:
    """One stage being built: a directory that stands for `/`, a virtual environment, and variables."""

    def __init__(self, directory: Path, stage: Stage, parent: Replay | None) -> None:
        self.stage = stage
        self.root = directory / stage.name
        self.venv = parent.venv if parent else directory / f"venv-{stage.name}"
        self.workdir = parent.workdir if parent else Path("/")
        self.variables = dict(parent.variables) if parent else {}
        if parent:
            shutil.copytree(parent.root, self.root)

    def prepare(self, python: str, packages: list[str], named: list[str]) -> None:
        """Stand in for the base image: its Python, and the packages that it brings, some of them in name only."""
        self.root.mkdir(parents=True)
        subprocess.run([python, "-m", "venv", self.venv], check=True)
        for name, version in (pin.split("==") for pin in named):
            (site,) = self.venv.glob("lib/python*/site-packages")
            metadata = site / f"{name.replace('-', '_')}-{version}.dist-info/METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        pip = [self.venv / "bin/python", "-m", "pip", "--quiet"]
        if packages:
            subprocess.run([*pip, "install", *packages], check=True)
            frozen = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout
            constraints = self.root / "constraint.txt"
            constraints.write_text(re.sub(r"(\S+) @ \S+/\1-([\w.+]+)-.*", r"\1==\2", frozen))
            self.variables["PIP_CONSTRAINT"] = str(constraints)

    def step(self, instruction: str, value: str, others: dict[str, Replay]) -> None:
        """Carry out one instruction. Raises CalledProcessError where a command fails."""
        if instruction == "RUN":
            self._run(value)
        elif instruction == "COPY":
            self._copy(value, others)
        elif instruction == "WORKDIR":
            self.workdir = Path(value)
            self.here.mkdir(parents=True, exist_ok=True)
        elif instruction == "ENV":
            settings = dict(pair.split("=", 1) for pair in value.split())
            self.variables |= {name: self._inside(setting) for name, setting in settings.items()}
            Path(self.variables.get("HOME", self.root)).mkdir(parents=True, exist_ok=True)
        elif instruction == "ARG" and "=" in value:
            name, _, default = value.partition("=")
            self.variables.setdefault(name, default)

    @property
    def here(self) -> Path:
        return self.root / self.workdir.relative_to("/")

    def shell(self, command: str | list[str]) -> None:
        """Run as the image would: a string by bash, a list as it is."""
        path = f"{self.venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, **self.variables, "PATH": path, "VIRTUAL_ENV": str(self.venv)}
        environment.pop("PYTHONPATH", None)
        words = ["bash", "-euo", "pipefail", "-c", command] if isinstance(command, str) else command
        started = time.monotonic()
        subprocess.run(words, cwd=self.here, env=environment, check=True)
        say(f"  {time.monotonic() - started:.0f} s")

    def _run(self, command: str) -> None:
        if command.startswith(NEEDS_ROOT):
            return say("  not replayed: needs root")
        self.shell(command)

    def _copy(self, value: str, others: dict[str, Replay]) -> None:
        source_stage = re.match(r"--from=(\S+)", value)
        *sources, target = [word for word in value.split() if not word.startswith("--")]
        for source in sources:
            path = others[source_stage[1]].root / source.lstrip("/") if source_stage else ROOT / source
            if path.is_dir():  # COPY copies what is in a directory
                shutil.copytree(
                    path, self.here / target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy(path, self.here / target)

    def _inside(self, value: str) -> str:
        return str(self.root / value.lstrip("/")) if value.startswith("/") else value


def replay(
    stages: list[Stage], directory: Path, python: str, base: list[str], named: list[str] | None = None
) -> Replay:
    """Build these stages; the last one is returned."""
    done: dict[str, Replay] = {}
    for stage in stages:
        say(f"FROM {stage.base} AS {stage.name}")
        current = Replay(directory, stage, done.get(stage.base))
        if stage.base not in done:
            is_bare = stage.base.startswith("python:")
            current.prepare(python, [] if is_bare else base, [] if is_bare else named or [])
        for instruction, value in stage.steps:
            say(f"{instruction} {value}")
            current.step(instruction, value, done)
        done[stage.name] = current
    return current


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--target", help="the stage; the last one by default")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the base image")
    parser.add_argument("--base", nargs="+", default=[], help="packages that the base image brings")
    parser.add_argument("--named", nargs="+", default=[], metavar="NAME==VERSION", help="there by their metadata alone")
    parser.add_argument("--directory", type=Path, required=True, help="a new directory for it all")
    parser.add_argument("--check", action="store_true", help="run the HEALTHCHECK at the end")
    arguments = parser.parse_args()
    stages = read_stages(arguments.dockerfile)
    stages = needed(stages, arguments.target or stages[-1].name)
    try:
        built = replay(stages, arguments.directory.resolve(), arguments.python, arguments.base, arguments.named)
        if arguments.check:
            (check,) = [value for instruction, value in built.stage.steps if instruction == "HEALTHCHECK"]
            say(f"HEALTHCHECK {check}")
            built.shell(json.loads(check.partition(" CMD ")[2]))
    except subprocess.CalledProcessError as error:
        say(f"failed with exit code {error.returncode}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
