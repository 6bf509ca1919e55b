"""The result of an evaluation on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from chord_megatron.system.wide_tables import WideTable

_MOST_SOURCES = 50


def tables(result: dict[str, Any]) -> Group:
    """What `chord-megatron evaluate` prints: all prompts, then by source where there are several."""
    total = Table()
    for column in ("", "mean", f"{result['confidence']:.0%} interval", "by"):
        total.add_column(
            column, justify="left" if column in ("", "by") else "right", overflow="fold", no_wrap=bool(column)
        )
    shown = [name for name in result["metrics"] if _is_shown(name, result["k"])]
    for name in shown:
        total.add_row(escape(name), *_cells(result["metrics"][name]))
    parts: list[RenderableType] = [Text(_title(result), overflow="fold"), total]
    if len(result["sources"]) > 1:
        parts += _by_source(result)
    parts.append(Text(f"passes: {result['passes']}"))
    for key in ("unscorable_completions", "reward_errors"):
        if result[key]:
            parts.append(Text(f"{key}: {result[key]} of {result['num_completions']}"))
    return Group(*parts)


def _title(result: dict[str, Any]) -> str:
    count, k = result["num_prompts"], result["k"]
    drawn = f"{k} completions of each" if k > 1 else "a completion of each"
    how = f"temperature {result['temperature']:g}" if result["temperature"] else "greedy"
    return f"{result['model']} on {count} prompts of {result['prompts']}, {drawn}, {how}"


def _is_shown(name: str, k: int) -> bool:
    """Of pass@1 to pass@k the powers of two, and k."""
    _, at, number = name.partition("pass@")
    return not at or int(number) == k or int(number).bit_count() == 1


def _cells(found: dict[str, Any] | None) -> tuple[str, str, str]:
    if found is None:
        return "–", "", "no answers found"
    if found["low"] is None:
        return f"{found['value']:.4g}", "", "one prompt"
    return f"{found['value']:.4g}", f"{found['low']:.4g} to {found['high']:.4g}", found["interval"]


def _by_source(result: dict[str, Any]) -> Iterator[RenderableType]:
    sources = sorted(result["sources"].items(), key=lambda item: -item[1]["num_prompts"])
    shown, k = sources[:_MOST_SOURCES], result["k"]
    names = ["reward_mean", "pass@1", *([f"pass@{k}", f"maj@{k}"] if k > 1 else []), "truncated_fraction"]
    if all(found["metrics"]["pass@1"] == found["metrics"]["reward_mean"] for _, found in shown):
        names.remove("pass@1")
    rows = [
        [source, str(found["num_prompts"]), *(_short(found["metrics"][name]) for name in names)]
        for source, found in shown
    ]
    yield WideTable(["source", "prompts", *names], rows, "right", title="by source")
    if len(sources) > len(shown):
        yield Text(f"and {len(sources) - len(shown)} more: --json")


def _short(found: dict[str, Any] | None) -> str:
    if found is None or found["low"] is None:
        return "–" if found is None else f"{found['value']:.3g}"
    return f"{found['value']:.3g} [{found['low']:.2g}, {found['high']:.2g}]"
