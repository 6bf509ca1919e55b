"""What a user's reward function may ask for by the names of its parameters, and what it then gets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

FIXED = ("prompts", "completions", "references")
# What the reference is called in functions for TRL and ms-swift, whatever the data call it.
_REFERENCE_NAMES = {"answer", "ground_truth", "solution"}
# The tokens of each completion with the one that ends it: TRL's name and ms-swift's. Only for those who name them.
TOKEN_NAMES = ("completion_ids", "response_token_ids")


@dataclass(frozen=True)
class Parameters:
    """Of a function, as worker.py reads them."""

    required: list[str]
    optional: list[str]
    takes_all: bool  # **columns


@dataclass(frozen=True)
class Offer:
    """The names that can be asked for."""

    columns: Collection[str] | None = None  # of the data; None: known with the first call
    reference_column: str | None = None

    @property
    def reference_names(self) -> list[str]:
        """Further names of the reference: a column of that name wins."""
        leaf = (self.reference_column or "answer").rpartition(".")[2]  # reward_model.ground_truth
        return sorted({*_REFERENCE_NAMES, leaf} - set(self.columns or ()))

    def refusal(self, parameters: Parameters) -> str | None:
        """What the function needs and cannot get, as the rest of a sentence."""
        if self.columns is None:
            return None
        columns = list(self.columns)
        known = {*FIXED, *TOKEN_NAMES, *columns, *self.reference_names}
        missing = [name for name in parameters.required if name not in known]
        if not missing:
            return None
        offered = [", ".join((*FIXED, TOKEN_NAMES[0])), *(["the columns " + ", ".join(columns)] if columns else [])]
        return (
            f"needs {', '.join(map(repr, missing))}, which {'is' if len(missing) == 1 else 'are'} not offered; "
            f"offered are {', '.join(offered)}, and the reference as {', '.join(self.reference_names)}; "
            "rename the parameter, or give it a default"
        )

    def choose(
        self, parameters: Parameters, fixed: Mapping[str, Any], tokens: Any, columns: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The arguments of a call, from the values of FIXED, the tokens of completions, and the columns."""
        named = {*parameters.required, *parameters.optional}
        offered = {**columns, **fixed}  # a column named "prompts" cannot be had
        further = {**dict.fromkeys(self.reference_names, fixed["references"]), **dict.fromkeys(TOKEN_NAMES, tokens)}
        return {
            **{name: value for name, value in offered.items() if parameters.takes_all or name in named},
            **{name: value for name, value in further.items() if name in named and name not in offered},
        }
