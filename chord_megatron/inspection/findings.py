"""What to look into, in sentences: the first thing that a reader sees."""

from __future__ import annotations

from collections.abc import Iterator

from chord_megatron.data.formats import REFERENCES
from chord_megatron.inspection.expert_rewards import ExpertRewards
from chord_megatron.inspection.look import DataSet, FoundDuplicates, Inspection

NOTHING = "Nothing stands out."


def findings(found: Inspection) -> list[str]:
    """The most harmful first."""
    return [
        *(_expert_rewards(found.expert_rewards) if found.expert_rewards else ()),
        *(sentence for data_set in found.data_sets for sentence in _rows(data_set, found.on_bad_row)),
        *(sentence for duplicates in found.duplicates for sentence in _duplicates(duplicates)),
    ]


def _expert_rewards(rewards: ExpertRewards) -> Iterator[str]:
    if rewards.error is not None:
        yield f"experts: the reward functions could not be asked: {rewards.error}"
    for function in rewards.functions:
        if function.rejected:
            yield (
                f"experts: {function.name} rejects {_of(function.rejected, rewards.scored)} answers: a run learns "
                "them from the experts, and is punished for them in its own completions"
            )
        if function.unscorable:
            yield f"experts: {function.name} gives {_of(function.unscorable, rewards.scored)} answers no reward"
    if rewards.without_reference and rewards.scored:
        total = rewards.scored + rewards.without_reference
        yield f"experts: {_of(rewards.without_reference, total)} rows have no reference to compare their answer with"
    elif rewards.without_reference:
        yield (
            "experts: no row has a reference to compare its answer with: no prompt asks the same, and there is no "
            f"column {_looked_for(rewards.reference_column)}"
        )


def _looked_for(named: str | None) -> str:
    if named is not None:
        return f"{named!r}, which data.reference_column names"
    *names, last = map(repr, REFERENCES)
    return f"{', '.join(names)} or {last}; data.reference_column may name another"


def _rows(data_set: DataSet, on_bad_row: str) -> Iterator[str]:
    name = data_set.name
    if data_set.bad:
        count = sum(kind.count for kind in data_set.bad)
        first = data_set.bad[0].places[0]
        then = f"a run stops at {first}" if on_bad_row == "stop" else "a run skips them"
        yield f"{name}: {_rows_of(count)} cannot be used; data.on_bad_row={on_bad_row}: {then}"
    if data_set.too_long:
        long = data_set.too_long
        yield f"{name}: {_of(long.count, data_set.usable)} rows are {long.reason} (up to {long.example}), and left out"
    for kind in data_set.cut_references:
        yield (
            f"{name}: {_of(kind.count, data_set.usable)} references seem to be cut ({kind.places[0]}: {kind.reason})"
        )


def _duplicates(found: FoundDuplicates) -> Iterator[str]:
    counts = found.counts
    if not counts.count:
        return
    exactly = f"{counts.exact:,} of them exactly" if counts.exact else "but for case and white space"
    exactly = exactly if counts.normalised else "all of them exactly"
    where = "come twice or more" if counts.data_set == counts.other else f"are also in the {counts.other}"
    yield f"{counts.data_set}: {_of(counts.count, counts.of)} questions {where}, {exactly}"


def _of(count: int, total: int) -> str:
    return f"{count:,} of {total:,}"


def _rows_of(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"
