"""An inspection on a terminal, or as plain text: what is trained is in brackets, in colour where there is any."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chord_megatron.inspection.expert_rewards import ExpertRewards
from chord_megatron.inspection.findings import NOTHING, findings
from chord_megatron.inspection.lengths import Lengths
from chord_megatron.inspection.lines import (
    bin_label,
    duplicate_line,
    duplicates_line,
    function_line,
    left_out,
    length_line,
    reference_line,
    rejected_lines,
    rewards_line,
    role_groups,
    row_line,
    summary_lines,
    weight_mark,
)
from chord_megatron.inspection.look import DataSet, FoundDuplicates, Inspection, ShownRow
from chord_megatron.inspection.spans import Span
from chord_megatron.inspection.visible import visible

_OPENS, _CLOSES, _LINE_END = "⟦", "⟧", "↵"
_BAR = 30  # characters of the longest bar
_TRAINED, _SPECIAL, _MUTED = "bold green underline", "yellow", "dim"
_ROLES = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "blue"}


def print_inspection(found: Inspection, console: Console) -> None:
    """Everything, the most important first."""
    console.print(Text(visible(f"What {found.model} reads"), style="bold"), soft_wrap=True)
    for sentence in findings(found) or [NOTHING]:
        _line(console, f"- {sentence}")
    for data_set in found.data_sets:
        _print_data_set(data_set, console)
    console.print()
    for duplicates in found.duplicates:
        _print_duplicates(duplicates, console)
    if found.expert_rewards is not None:
        _print_rewards(found.expert_rewards, console)


def _print_data_set(data_set: DataSet, console: Console) -> None:
    console.print()
    console.print(Text(visible(f"── {data_set.name}: {data_set.path}"), style="bold"), soft_wrap=True)
    for line in summary_lines(data_set):
        _line(console, line)
    for kind in left_out(data_set):
        _line(console, f"- {kind}")
    for lengths in data_set.lengths:
        _line(console, "\n" + length_line(lengths))
        console.print(_histogram(lengths))
    for row in data_set.shown:
        _line(console, "\n" + row_line(row))
        console.print(_row(row))
        if row.reference is not None:
            _line(console, reference_line(row))


def _histogram(lengths: Lengths) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    most = max(each.count for each in lengths.bins)
    for each in lengths.bins:
        bar = "█" * -(-each.count * _BAR // most)
        table.add_row(f"  {bin_label(each)}", f"{each.count:,}", Text(bar, style="cyan"))
    return table


def _row(row: ShownRow) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for role, spans in role_groups(row.spans):
        style = _ROLES.get(role, _MUTED)
        text = Text()
        for span in spans:
            _append(text, span, style)
        if text.plain.endswith("\n"):
            text.right_crop()
        table.add_row(Text(f"  {role}", style=style), text)
    return table


def _append(text: Text, span: Span, style: str) -> None:
    shown = visible(span.text).replace("\n", f"{_LINE_END}\n")
    if span.weight:
        style = _TRAINED
        shown = f"{_OPENS}{weight_mark(span)}{shown}{_CLOSES}"
    elif span.special:
        style = _SPECIAL
    text.append(shown, style)


def _print_duplicates(found: FoundDuplicates, console: Console) -> None:
    _line(console, duplicates_line(found))
    for example in found.examples:
        _line(console, f"  {duplicate_line(example)}")


def _print_rewards(rewards: ExpertRewards, console: Console) -> None:
    _line(console, "\n" + rewards_line(rewards))
    if rewards.error is not None:
        _line(console, f"  {rewards.error}")
    for function in rewards.functions:
        _line(console, f"  {function_line(function, rewards.scored)}")
    for example in rewards.examples:
        where, what = rejected_lines(example)
        _line(console, f"  {where}:\n    {what}")


def _line(console: Console, line: str) -> None:
    console.print(visible(line), markup=False, highlight=False, soft_wrap=True)
