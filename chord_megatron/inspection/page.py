"""An inspection as one HTML page that needs nothing else: no script, no address; all texts of others are escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

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

# Nothing may be loaded or run, whatever a row holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

CSS = """
:root { color-scheme: light dark;
  --ink: #1a202c; --muted: #5a6678; --paper: #fff; --card: #f4f6f9; --rule: #dbe1ea;
  --learnt: #d3f2dc; --learnt-ink: #0f5132; --special: #8a5a00; --bar: #5b8def; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --muted: #9aa7b8; --paper: #14181f; --card: #1e242e; --rule: #333c4a;
    --learnt: #14432a; --learnt-ink: #b8f0cb; --special: #f0c060; --bar: #5b8def; }
}
* { box-sizing: border-box; }
body { margin: 1.5rem auto; max-width: 64rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin-bottom: .3rem; }
p, ul { margin: .4rem 0; } ul { padding-left: 1.2rem; }
p.muted, small { color: var(--muted); }
.row { background: var(--card); border: 1px solid var(--rule); border-radius: 6px; padding: .5rem .7rem; }
.row div { display: grid; grid-template-columns: 5.2rem 1fr; gap: .5rem; }
.row small { font-size: .75rem; line-height: 1.9; }
.row pre { margin: 0; font-size: .82rem; line-height: 1.6; white-space: pre-wrap; overflow-wrap: anywhere;
  min-width: 0; unicode-bidi: plaintext; }
mark { background: var(--learnt); color: var(--learnt-ink); text-decoration: underline; text-underline-offset: 3px; }
pre b { color: var(--special); font-weight: 600; } pre i { color: var(--muted); }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { font-weight: normal; color: var(--muted); text-align: right; white-space: nowrap; width: 1%; }
td { text-align: right; padding: 0 .5rem; width: 1%; } td.bar { width: 98%; text-align: left; }
.bar span { display: block; height: .8rem; background: var(--bar); border-radius: 2px; }
@media (max-width: 480px) { .row div { grid-template-columns: 1fr; gap: 0; } }
"""
LEGEND = (
    "<p>In the rows below, <mark>what is marked and underlined is learnt</mark>; everything else is read only. "
    "<b>Special tokens</b> are those of the tokenizer's own; ↵ is the end of a line.</p>"
)


def page_of(found: Inspection) -> str:
    """The page."""
    title = f"What {found.model} reads"
    parts = [
        f"<h1>{_text(title)}</h1>",
        _list(findings(found) or [NOTHING]),
        LEGEND,
        *map(_data_set, found.data_sets),
        "<h2>Duplicates</h2>",
        *map(_duplicates, found.duplicates),
        _rewards(found.expert_rewards) if found.expert_rewards is not None else "",
    ]
    body = "\n".join(filter(None, parts))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{_text(title)}</title>
<style>{CSS}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _data_set(data_set: DataSet) -> str:
    summary, *forms = summary_lines(data_set)
    return "\n".join(
        [
            f"<h2>{_text(data_set.name)}: {_text(data_set.path)}</h2>",
            f"<p>{_text(summary)}</p>",
            _list(forms + left_out(data_set)),
            *map(_lengths, data_set.lengths),
            *map(_row, data_set.shown),
        ]
    )


def _lengths(lengths: Lengths) -> str:
    most = max(each.count for each in lengths.bins)
    rows = "".join(
        f"<tr><th>{bin_label(each)}</th><td>{each.count:,}</td>"
        f'<td class="bar"><span style="width:{100 * each.count / most:.1f}%"></span></td></tr>'
        for each in lengths.bins
    )
    return f"<p>{_text(length_line(lengths))}</p>\n<table>{rows}</table>"


def _row(row: ShownRow) -> str:
    groups = "".join(
        f'<div><small>{_text(role)}</small><pre dir="auto">{"".join(map(_span, spans))}</pre></div>'
        for role, spans in role_groups(row.spans)
    )
    reference = "" if row.reference is None else f'<p class="muted">{_text(reference_line(row))}</p>'
    return f'<h3>{_text(row_line(row))}</h3>\n<div class="row">{groups}</div>{reference}'


def _span(span: Span) -> str:
    text = _text(span.text).replace("\n", "↵\n")
    if span.special:
        text = f"<b>{text}</b>"
    if not span.tokens:
        text = f"<i>{text}</i>"
    return f"<mark>{weight_mark(span)}{text}</mark>" if span.weight else text


def _duplicates(found: FoundDuplicates) -> str:
    return f"<p>{_text(duplicates_line(found))}</p>{_list(map(duplicate_line, found.examples))}"


def _rewards(rewards: ExpertRewards) -> str:
    lines = [] if rewards.error is None else [rewards.error]
    lines += [function_line(function, rewards.scored) for function in rewards.functions]
    examples = [": ".join(rejected_lines(example)) for example in rewards.examples]
    return f"<h2>Rewards of expert answers</h2>\n<p>{_text(rewards_line(rewards))}</p>\n{_list(lines + examples)}"


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _text(text: str) -> str:
    return escape(visible(text))
