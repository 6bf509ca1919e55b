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
    read_as: Counter[str] = field(default_factory=Counter)
    beside: Counter[str] = field(default_factory=Counter)  # what was used beside the question
    end_token_ids: set[int] = field(default_factory=set)
    bad_rows: dict[str, tuple[int, str]] = field(default_factory=dict)  # as of `BadRows.found`

    def count(self, conversation: Conversation, end_token_id: int) -> None:
        """One more row that can be used."""
        self.usable += 1
        self.end_token_ids.add(end_token_id)
        self.read_as[conversation.read_as] += 1
        self.beside.update(conversation.columns)

    def add(self, other: Tally) -> None:
        """The rows that follow; but for those that are bad, which `BadRows` adds up."""
        self.usable += other.usable
        self.read_as.update(other.read_as)
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
            Counter(value["read_as"]),
            Counter(value["beside"]),
            set(value["end_token_ids"]),
            {reason: (number, first) for reason, (number, first) in value["bad_rows"].items()},
        )

    def __str__(self) -> str:
        kinds = (f"{number:,} row{'s' * (number != 1)} read as {kind}" for kind, number in self.read_as.items())
        return "; ".join(kinds) + "".join(f"; beside it: {name} ({number:,})" for name, number in self.beside.items())
