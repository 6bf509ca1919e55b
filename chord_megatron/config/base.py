"""What the groups of keys have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Group(BaseModel):
    """Keys that belong together. The text below each is its description, in Markdown, for docs/configuration.md."""

    # strict: no text for a number, no true for 1. What YAML says is what is meant.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
