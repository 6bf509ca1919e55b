"""A run whose background saves are held back: `held_saves.py HELD_STEP FILE ARGUMENTS-of-train`.

Of the checkpoint of HELD_STEP eight tensors are written, and then no more until FILE is there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from chord_megatron.backend.checkpoint_writer import ShardedWrite
from chord_megatron.system.background import Check
from chord_megatron.training.main import main

write = ShardedWrite.write


def hold(step: str, release: Path) -> None:
    def write_by_half(tensors: Any, check: Check) -> None:
        parts = iter(range(10**6))

        def check_and_hold() -> None:
            check()
            while tensors._writer.path.name == f"step_{step}.partial" and next(parts) > 8 and not release.exists():
                time.sleep(0.01)

        write(tensors, check_and_hold)

    ShardedWrite.write = write_by_half


if __name__ == "__main__":
    hold(sys.argv[1], Path(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
