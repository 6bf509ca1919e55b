"""What a trainer and its rollout servers must have in common: the secret, the model, and the routes of an update."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chord_megatron.system.errors import UserError
from chord_megatron.weights.hf_config import read_architecture

TOKEN_VARIABLE = "CHORD_SERVER_TOKEN"

# vLLM's routes.
GENERATE = "/inference/v1/generate"
START_UPDATE, UPDATE, FINISH_UPDATE = "/start_weight_update", "/update_weights", "/finish_weight_update"
JOIN_GROUP, WORLD_SIZE = "/init_weight_transfer_engine", "/get_world_size"
PAUSE, RESUME, RESET_PREFIX_CACHE = "/pause", "/resume", "/reset_prefix_cache"
# The guard's.
STATUS, RESTART = "/chord/status", "/chord/restart"


def read_token() -> str:
    """The secret that trainer and servers share. Raises UserError."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if len(token) < 16 or not token.isascii() or not token.isprintable():
        raise UserError(
            f"set the environment variable {TOKEN_VARIABLE} to a secret of at least 16 printable ASCII characters, "
            "the same for the trainer and its servers; `openssl rand -hex 32` makes one"
        )
    return token


def identity(model_dir: Path, dtype: str) -> dict[str, Any]:
    """Of which model the weights are, as JSON values: architecture, dtype and vocabulary."""
    tokenizer = model_dir / "tokenizer.json"
    return {
        "architecture": json.loads(json.dumps(asdict(read_architecture(model_dir)), default=str)),
        "dtype": dtype,
        "tokenizer_sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else None,
    }
