"""A command of chord-megatron, or `common_state FOLDER`, with 1.5 GB beyond what Python takes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch  # noqa: F401 - so that it is there before the limit is
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

from chord_megatron.backend.engine import MegatronEngine  # noqa: F401
from chord_megatron.checkpoints import conversion  # noqa: F401
from chord_megatron.checkpoints.common_state import read_common_state
from chord_megatron.cli.main import app
from chord_megatron.system.errors import UserError

now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 15 * 10**8, resource.RLIM_INFINITY))
if sys.argv[1] == "common_state":
    try:
        read_common_state(Path(sys.argv[2]), "name another")
    except UserError as error:
        sys.exit(f"error: {error}")
else:
    app()
