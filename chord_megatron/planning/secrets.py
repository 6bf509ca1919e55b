"""What must not be in a configuration, because a run writes it down and tells trackers of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from chord_megatron.config import Config
from chord_megatron.system.errors import UserError
from chord_megatron.system.secrets import has_password


def check_secrets(config: Config) -> None:
    """Raise UserError where an address has a password."""
    for group, keys in config.model_dump().items():
        for key, value in keys.items():
            if any(has_password(text) for text in _texts(value)):
                raise UserError(
                    f"{group}.{key} has a user or password in an address, and the run would write it down; leave it "
                    "out, and give it in the environment"
                )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
