"""`python same_torch.py record | check FILE`: notes which torch an image has, and fails where it is another one later.

pip replaces a torch that a new package does not like without a word; NVIDIA's is built for the rest of its image.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def found() -> dict[str, str]:
    """Version, commit and place of the torch that is imported; its version as pip sees it."""
    return {
        "version": torch.__version__,
        "commit": torch.version.git_version,
        "file": torch.__file__,
        "distribution": version("torch"),
    }


def main(action: str, path: Path) -> int:
    """Returns the exit code."""
    now = found()
    if action == "record":
        path.write_text(json.dumps(now))
    recorded = json.loads(path.read_text())
    print(f"torch {now['version']} in {now['file']}")
    if now != recorded:
        print(f"error: torch was replaced: {recorded} before, {now} now", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
