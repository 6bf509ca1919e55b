"""Versions and commit that a run is computed with."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from chord_megatron import __version__
from chord_megatron.system.provenance import commit, provenance


def git(folder: Path, *arguments: str) -> str:
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", *name, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_commit_is_that_of_the_checkout_around_the_package(tmp_path: Path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    assert commit(package) is None  # it lies in a repository that does not hold it, as a venv does
    git(tmp_path, "add", "package/__init__.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    assert commit(package) == head
    (tmp_path / "beside").write_text("x")
    assert commit(package) == head
    (package / "__init__.py").write_text("x = 1\n")
    assert commit(package) == f"{head}+"


def test_without_a_repository_there_is_no_commit(tmp_path: Path):
    assert commit(tmp_path) is None


def test_versions_are_those_that_are_installed():
    found = provenance()
    assert [*found][:1] == ["chord_megatron"] and found["chord_megatron"] == __version__
    assert found["python"] == platform.python_version()
    for name in ("torch", "megatron-core", "transformers"):
        assert found[name] == metadata.version(name)
