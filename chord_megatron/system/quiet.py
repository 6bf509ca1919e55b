"""What other packages say of themselves to their developers, left out: each by its exact place and words.

Of the standard library alone: a server's processes read this before they import vLLM.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
from typing import NoReturn

# For the processes that Python starts to look after shared memory. vLLM 0.32 leaves it to them to remove two pieces.
_OF_RESOURCE_TRACKERS = "ignore:resource_tracker:UserWarning:multiprocessing.resource_tracker"


def silence_vllm() -> None:
    """In this process; what vLLM 0.32 prints at each start without there being anything to do."""
    # vllm/triton_utils/importing.py, before vLLM's own level of logging holds: on CPU it is as it should be.
    logging.getLogger("vllm.triton_utils.importing").addFilter(_is_no_advice_on_triton)
    # vllm/triton_utils/dispatcher.py looks at every attribute of every module, torch's old names among them.
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.reduce_op` is deprecated", FutureWarning, r"vllm\.triton_utils\.dispatcher"
    )


def silenced_environment() -> dict[str, str]:
    """PYTHONWARNINGS for processes that start others; what the user has there comes later, and holds."""
    return {"PYTHONWARNINGS": ",".join(filter(None, (_OF_RESOURCE_TRACKERS, os.environ.get("PYTHONWARNINGS"))))}


def end_without_leak_lists(exit_code: int) -> NoReturn:
    """End as the interpreter does, but for its last part: there nanobind lists what Triton's bindings never free."""
    atexit._run_exitfuncs()  # noqa: SLF001 - it has no public name
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _is_no_advice_on_triton(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Triton is installed, but doesn't include CPU backend.")
