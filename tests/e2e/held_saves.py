"""A run whose background saves are held back: `held_saves.py HELD_STEP FILE ARGUMENTS-of-train`.

The checkpoint of HELD_STEP is written by half, and then not on until FILE is there.
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

from chord_megatron.system.background import BackgroundFiles
from chord_megatron.training.main import main

write_one = BackgroundFiles._write_one


def hold(step: str, release: Path) -> None:
    def write_by_half(files: BackgroundFiles, path: Path, content: io.BytesIO) -> None:
        if path.parent.name == f"step_{step}.partial":
            path.write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
            while not release.exists() and not files._is_unwanted:
                time.sleep(0.01)
        write_one(files, path, content)

    BackgroundFiles._write_one = write_by_half


if __name__ == "__main__":
    hold(sys.argv[1], Path(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
