"""Secrets, kept out of what is written and sent: of addresses, and of the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

_HIDDEN = "***"
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s'\"]+(?=@)")  # USER:PASSWORD, or a token
_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # of a value: shorter ones are in any text


def has_password(text: str) -> bool:
    """Whether there is an address with a user's name or password in it."""
    return _IN_ADDRESS.search(text) is not None


def is_secret(name: str) -> bool:
    """Whether the name of a variable speaks of a secret."""
    return _NAMES.search(name) is not None


def without_secrets(text: str) -> str:
    """The text with *** for passwords in addresses and for values of variables whose names speak of a secret."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and is_secret(name):
            text = text.replace(value, _HIDDEN)
    return _IN_ADDRESS.sub(_HIDDEN, text)


def without_secrets_in(value: Any) -> Any:
    """The same of every text in groups and lists."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {key: without_secrets_in(item) for key, item in value.items()}
    return [without_secrets_in(item) for item in value] if isinstance(value, list | tuple) else value
