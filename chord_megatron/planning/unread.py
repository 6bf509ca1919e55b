"""Keys that are set and that nothing reads: whoever set one expects something of it."""

from __future__ import annotations

from collections.abc import Iterable

from chord_megatron.config import ChordConfig, GRPOConfig, RewardsConfig
from chord_megatron.system.errors import UserError


def refuse_unread(name: str, group: ChordConfig | GRPOConfig | RewardsConfig, keys: Iterable[str], reader: str) -> None:
    """Raise UserError where one of these keys of the group, which `reader` does not read, differs from its default."""
    for key in keys:
        value = getattr(group, key)
        if value != type(group).model_fields[key].default:
            raise UserError(f"{name}.{key}={value} is not read by {reader}; remove it")
