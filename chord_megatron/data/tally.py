"""What the rows of a data set were taken for: rows that are read differently than meant are worse than a refusal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chord_megatron.data.conversations import Conversation


@dataclass
class Tally:
    """Of some rows in a row; those of the rows that follow are added to it."""

    usable: int = 0
    prompts: Counter[str] = field(default_factory=Counter)  # by column and kind
    beside: Counter[str] = field(default_factory=Counter)  # columns that changed the prompt
    end_token_ids: set[int] = field(default_factory=set)
    bad_rows: dict[str, tuple[int, str]] = field(default_factory=dict)  # as of `BadRows.found`

    def count(self, conversation: Conversation, end_token_id: int) -> None:
        """One more row that can be used."""
        self.usable += 1
        self.end_token_ids.add(end_token_id)
        self.prompts[f"column {conversation.column!r} ({conversation.kind})"] += 1
        self.beside.update(f"column {column!r}" for column in conversation.columns)

    def add(self, other: Tally) -> None:
        """The rows that follow; but for those that are bad, which `BadRows` adds up."""
        self.usable += other.usable
        self.prompts.update(other.prompts)
        self.beside.update(other.beside)
        self.end_token_ids |= other.end_token_ids

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "end_token_ids": sorted(self.end_token_ids)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Tally:
        """Of what `to_json` made."""
        return Tally(
            value["usable"],
            Counter(value["prompts"]),
            Counter(value["beside"]),
            set(value["end_token_ids"]),
            {reason: (number, first) for reason, (number, first) in value["bad_rows"].items()},
        )

    def line(self, other: str) -> str:
        """The sentence of it."""
        prompts = ", ".join(
            f"{number} {kind}" if len(self.prompts) > 1 else kind for kind, number in self.prompts.items()
        )
        line = f"{self.usable} rows; prompt: {prompts}; {other}"
        return line + "".join(f"; beside it: {name} ({number})" for name, number in self.beside.items())
