"""The documentation: links lead somewhere, every page is in the site, every command in it exists as it is called."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from chord_megatron.cli import app
from chord_megatron.config.reference import find_keys

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"^```.*?^```|^    .*?$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
NAMES = {page: str(page.relative_to(ROOT)) for page in PAGES}


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and MkDocs make them."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    plain = (LINK.sub(lambda link: link[0][1:].split("]")[0], title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `chord-megatron ...` in a page's code blocks."""
    for block in FENCE.findall(page.read_text(encoding="utf-8")):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            program, _, rest = line.removeprefix("$ ").partition(" ")
            if Path(program).name == "chord-megatron":
                yield shlex.split(rest.split(" > ")[0].split(" | ")[0], comments=True)


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_links_lead_somewhere(page: Path):
    for link in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{NAMES[page]} links to {link}"
        assert not anchor or anchor in anchors(target), f"{NAMES[page]} links to {link}, and has no such heading"


def test_every_page_is_in_the_site():
    def pages(entries: object) -> Iterator[str]:
        for entry in entries.values() if isinstance(entries, dict) else entries:  # type: ignore[attr-defined]
            if isinstance(entry, str):
                yield entry
            else:
                yield from pages(entry)

    nav = set(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page.parent.name != "decisions"}
    assert nav == there | {"decisions/README.md"}


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_commands_are_called_as_they_are(page: Path):
    """Names, options and keys; tests of the commands and of the tutorial run them."""
    for words in commands(page):
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            assert words[0] in command.commands, f"{NAMES[page]}: {words}"
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        known |= {"--help"}
        for word in words:
            if word.startswith("--"):
                assert word.split("=")[0] in known, f"{NAMES[page]}: {command.name} has no {word}"
            elif re.fullmatch(r"[a-z]+\.[a-z_0-9]+=.*", word):
                assert find_keys(word.split("=")[0])
