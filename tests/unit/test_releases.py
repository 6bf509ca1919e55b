"""What differs between releases of Megatron-Core: the list, its code, its table, and saved optimizer states."""

from __future__ import annotations

import ast
import json
from itertools import takewhile
from pathlib import Path

import pytest

from chord_megatron.backend.checkpoint import _written_by
from chord_megatron.backend.releases import DIFFERENCES, Difference, configure_saved_groups
from chord_megatron.system.versions import installed_version

ROOT = Path(__file__).resolve().parents[2]
RELEASE = installed_version("megatron-core")


def code_of(difference: Difference) -> list[tuple[Path, str]]:
    """(file, function) of each piece of code that covers it."""
    pairs = [text.split(", ") for text in difference.covered_by.split("; ")]
    return [(ROOT / "chord_megatron" / file, function) for file, function in pairs]


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: difference.what[:40])
def test_the_code_that_covers_a_difference_is_there(difference: Difference):
    for path, function in code_of(difference):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        assert function in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_the_table_in_the_docs_is_the_list():
    lines = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| releases | what they do | covered by |") + 2
    assert list(takewhile(bool, lines[start:])) == [row_of(difference) for difference in DIFFERENCES]


def row_of(difference: Difference) -> str:
    since, until = difference.since, difference.until
    releases = f"up to {until}" if since is None else f"since {since}" if until is None else f"{since} to {until}"
    code = ", ".join(f"`{path.name}`: `{function}`" for path, function in code_of(difference))
    return f"| {releases} | {difference.what} | {code} |"


def test_settings_are_given_to_every_saved_group_that_has_them():
    """Of one optimizer, and of several below their numbers; nothing else changes."""
    state = {
        "optimizer": {"param_groups": [{"lr": 1.0, "max_lr": 2.0, "wd_mult": 1.0}, {"lr": 3.0, "wd_mult": 0.0}]},
        0: {"optimizer": {"param_groups": [{"lr": 4.0, "step": 7}]}, "lr": 5.0},
        "param_state": [1, 2],
    }
    configure_saved_groups(state, {"lr": 0.5, "max_lr": 0.25})
    assert state == {
        "optimizer": {"param_groups": [{"lr": 0.5, "max_lr": 0.25, "wd_mult": 1.0}, {"lr": 0.5, "wd_mult": 0.0}]},
        0: {"optimizer": {"param_groups": [{"lr": 0.5, "step": 7}]}, "lr": 5.0},
        "param_state": [1, 2],
    }


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"megatron_core": "0.15.0"}, f" of megatron-core 0.15.0 (this is {RELEASE})"),
        ({"megatron_core": RELEASE}, ""),
        ({}, ""),
    ],
)
def test_the_release_that_wrote_a_checkpoint_is_named_where_it_is_another(
    document: dict[str, str], said: str, tmp_path: Path
):
    (tmp_path / "state.json").write_text(json.dumps(document))
    assert _written_by(tmp_path) == said


def test_a_checkpoint_without_its_document_was_written_by_nobody_known(tmp_path: Path):
    assert _written_by(tmp_path) == ""
    (tmp_path / "state.json").write_text("{")
    assert _written_by(tmp_path) == ""
