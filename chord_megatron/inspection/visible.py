"""Texts of others on a screen: whatever is invisible, or moves a cursor, as its escape."""

from __future__ import annotations

import unicodedata

# The two joiners are part of emoji and of words in several scripts; without them those fall apart.
_JOINERS = "\u200c\u200d"


def visible(text: str) -> str:
    """The text with control and format characters, halves of surrogates and tabs as escapes; line ends stay."""
    return text if text.isascii() and text.isprintable() else "".join(map(_visible, text))


def beginning(text: str, longest: int = 160) -> str:
    """The beginning of a text in one line."""
    line = " ".join(text.split())
    return visible(line if len(line) <= longest else line[: longest - 1] + "…")


def ending(text: str, longest: int = 160) -> str:
    """The end of a text in one line, where its answer is."""
    line = " ".join(text.split())
    return visible(line if len(line) <= longest else "…" + line[1 - longest :])


def _visible(character: str) -> str:
    category = unicodedata.category(character)
    is_shown = category not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in _JOINERS or character == "\n"
    return character if is_shown else character.encode("unicode_escape", errors="surrogatepass").decode("ascii")
