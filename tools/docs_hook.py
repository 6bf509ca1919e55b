"""For MkDocs: files outside docs/ are on no page of the site, so links to them become names; they have to be there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page with such links replaced. Raises FileNotFoundError."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve(strict=True)
        if target.is_relative_to(ROOT / "docs"):
            return link[0]
        name = target.relative_to(ROOT)
        return link[1] if link[1].strip("`") == str(name) else f"{link[1]} (`{name}`)"

    return LINK.sub(named, markdown)
