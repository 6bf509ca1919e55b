"""`python requirements.py [NAME ...]`: what pyproject.toml asks for, a line each, for `pip install --requirement`.

What the image has already keeps its range, so that pip leaves it alone; the rest comes in the version that the tests
ran with on this Python (constraints.txt). NAMEs: these only.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:  # an image of Python alone: pip brings its own copy
    from pip._vendor.packaging.requirements import Requirement


def requirements(only: list[str]) -> list[str]:
    """One requirement for each dependency. Raises KeyError for a name that pyproject.toml does not have."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    ranges = {re.match(r"[\w.-]+", line)[0]: line for line in project["dependencies"]}
    lines = [line for line in Path("constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate()]
    tested = {pin.name: f"{pin.name}{pin.specifier}" for pin in pins}
    return [tested[name] if name in tested and not is_installed(name) else ranges[name] for name in only or ranges]


def is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    print(*requirements(sys.argv[1:]), sep="\n")
