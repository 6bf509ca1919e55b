"""What a run is computed with: the versions of its packages, and the commit of this one where it is known."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from chord_megatron import __version__
from chord_megatron.system.versions import VLLM_DISTRIBUTIONS, installed_version

_PACKAGE = Path(__file__).parents[1]
_OTHERS = ("torch", "megatron-core", "transformers", *VLLM_DISTRIBUTIONS)
_SECONDS = 10  # for git


def provenance() -> dict[str, str]:
    """Versions by package, of those that are installed, and of Python; `commit` of this package."""
    found = {"chord_megatron": __version__, "commit": commit(_PACKAGE), "python": platform.python_version()}
    found |= {name: installed_version(name) for name in _OTHERS}
    return {name: version for name, version in found.items() if version is not None}


def commit(package: Path) -> str | None:
    """Of the checkout that the package is run from, with "+" where files differ from it; or of the one installed."""
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None:  # else a repository around a venv
        head = _git(package, "rev-parse", "HEAD")
        return f"{head}{'+' if _git(package, 'status', '--porcelain', '--', '.') else ''}" if head else None
    try:
        source = json.loads(metadata.distribution("chord_megatron").read_text("direct_url.json") or "{}")  # PEP 610
        return str(source["vcs_info"]["commit_id"])
    except (metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """What it says; None where it fails, or is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
