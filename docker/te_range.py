"""`python te_range.py`: fails where this image's TransformerEngine is not one that its megatron-core is for.

megatron-core 0.16.1 declares a range, in one of its extras; 0.17 and later declare the package without one. For these
the newest version that their code asks about, `is_te_min_version("2.14.0")`, is the least: with an older one they take
paths for older versions, which nobody runs with that release.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version


def needed(core: Distribution) -> tuple[SpecifierSet, str]:
    """The versions of TransformerEngine that this megatron-core is for, and where that is said."""
    lines = map(Requirement, core.requires or [])
    declared = [r.specifier for r in lines if canonicalize_name(r.name) == "transformer-engine" and r.specifier]
    if declared:
        return SpecifierSet(",".join(map(str, declared))), "declared"
    code = [path.read_text() for path in Path(core.locate_file("megatron/core")).rglob("*.py")]
    asked = [match for text in code for match in re.findall(r"""is_te_min_version\(\s*["']([\w.]+)["']""", text)]
    return SpecifierSet(f">={max(asked, key=Version)}" if asked else ""), "by its code, it declares no range"


def main() -> str | None:
    """Returns what is wrong, for sys.exit."""
    core = distribution("megatron-core")
    versions, where = needed(core)
    wanted = f"megatron-core {core.version} is for TransformerEngine {versions or 'of any version'} ({where})"
    try:
        engine = distribution("transformer-engine").version
    except PackageNotFoundError:
        return f"error: {wanted}, and this image has none: give another one, --build-arg PYTORCH=..."
    if not versions.contains(engine, prereleases=True):
        return f"error: {wanted}, and this image has {engine}: give another one, --build-arg PYTORCH=..."
    print(f"{wanted}; here is {engine}")
    return None


if __name__ == "__main__":
    sys.exit(main())
