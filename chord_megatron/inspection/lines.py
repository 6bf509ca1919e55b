"""The words of an inspection, which the terminal and the page share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from chord_megatron.inspection.expert_rewards import ExpertRewards, FunctionScores, RejectedAnswer
from chord_megatron.inspection.lengths import Bin, Lengths
from chord_megatron.inspection.look import DataSet, DuplicateExample, FoundDuplicates, LeftOut, ShownRow
from chord_megatron.inspection.spans import Span
from chord_megatron.inspection.visible import beginning


def summary_lines(data_set: DataSet) -> list[str]:
    """How many rows there are and were looked at, and what they were taken for."""
    rows = f"{data_set.rows:,} row{'s' * (data_set.rows != 1)}"
    sampled = f"a sample of {data_set.sample:,}" if data_set.sample < data_set.rows else "all of them"
    compared = "" if data_set.compared == data_set.rows else f", questions of the first {data_set.compared:,} compared"
    return [f"{rows}; read in tokens: {sampled}{compared}", *data_set.forms]


def left_out(data_set: DataSet) -> list[str]:
    """What is dropped or suspicious, a line each."""
    kinds = [("unusable", kind) for kind in data_set.bad]
    kinds += [("dropped", data_set.too_long)] if data_set.too_long else []
    kinds += [("reference", kind) for kind in data_set.cut_references]
    return [_left_out(label, kind) for label, kind in kinds]


def _left_out(label: str, kind: LeftOut) -> str:
    more = ", ..." * (kind.count > len(kind.places))
    begins_with_reason = kind.example.startswith(kind.reason)
    example = kind.example.removeprefix(kind.reason) if begins_with_reason else f": {kind.example}"
    return f"{label}: {kind.count:,} x {kind.reason} ({', '.join(kind.places)}{more}){example}"


def length_line(lengths: Lengths) -> str:
    """The quantiles, in tokens."""
    limit = f"; {lengths.limit[0]}={lengths.limit[1]:,}" if lengths.limit else ""
    return (
        f"tokens of {lengths.what}: {lengths.smallest:,} to {lengths.largest:,}, median {lengths.median:,}, "
        f"95% up to {lengths.p95:,}, mean {lengths.mean:,.1f}{limit}"
    )


def bin_label(of: Bin) -> str:
    """The lengths of a bar."""
    return f"{of.start:,}" if of.stop == of.start + 1 else f"{of.start:,} to {of.stop - 1:,}"


def row_line(row: ShownRow) -> str:
    """Where it is, and how long."""
    return f"{row.place}: {row.tokens:,} tokens, {row.trained:,} trained"


def reference_line(row: ShownRow) -> str:
    """What reward functions compare a completion with."""
    read_as = "" if row.read_as is None else f", of which accuracy reads {row.read_as!r}"
    return f"  reference: {row.reference!r}{read_as}"


def role_groups(spans: Sequence[Span]) -> Iterator[tuple[str, list[Span]]]:
    """Neighbours of one role, with its name; specials and the template's own text go with `template`."""
    group: list[Span] = []
    name = ""
    for span in spans:
        role = beginning(span.role or "template", 12)
        if group and role != name:
            yield name, group
            group = []
        name = role
        group.append(span)
    if group:
        yield name, group


def weight_mark(span: Span) -> str:
    """What stands before a trained text whose weight is not 1."""
    return "" if span.weight in (0, 1) else f"{span.weight:g}× "


def duplicates_line(found: FoundDuplicates) -> str:
    """How many there are."""
    counts = found.counts
    where = "repeated within" if counts.data_set == counts.other else f"of {counts.data_set} also in"
    return (
        f"questions {where} {counts.other}: {counts.count:,} of {counts.of:,} "
        f"({counts.exact:,} exactly, {counts.normalised:,} but for case and white space)"
    )


def duplicate_line(example: DuplicateExample) -> str:
    """Where the two are, and what is asked."""
    return f"{example.place} {'=' if example.exact else '≈'} {example.other_place}: {example.question}"


def rejected_lines(example: RejectedAnswer) -> tuple[str, str]:
    """Where it is, and what was compared."""
    read_as = "no mark of a final answer" if example.read_as is None else f"final answer {example.read_as!r}"
    return (
        f"{example.place}, rejected by {', '.join(example.functions)}",
        f"reference {example.reference!r}; {read_as}; the answer: {example.answer}",
    )


def rewards_line(rewards: ExpertRewards) -> str:
    """How many answers were scored."""
    return (
        f"rewards of expert answers: {rewards.scored:,} scored ({rewards.by_prompt:,} against the reference of the "
        f"prompt that asks the same, {rewards.by_own:,} against their own column), {rewards.without_reference:,} "
        f"without a reference; {rewards.rejected:,} rejected"
    )


def function_line(function: FunctionScores, scored: int) -> str:
    """What a function gave them."""
    unscorable = f", {function.unscorable:,} without a reward" if function.unscorable else ""
    if function.mean is None:
        return f"{function.name}: no rewards"
    return (
        f"{function.name}: mean {function.mean:.3g}, from {function.smallest:g} to {function.largest:g}; "
        f"{function.rejected:,} of {scored:,} rejected{unscorable}"
    )
