"""How much text a token can stand for: what is longer than so many tokens for certain need not be tokenized."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}  # as SentencePiece writes them
# A character in NFC stands for at most so many, those of its canonical decomposition (Unicode, annex 15).
_CHARACTERS_OF_NFC = 4


def characters_per_token(tokenizer: Any) -> int | None:
    """The most characters of a text that one token can stand for; None where that is not known.

    It is the longest token, in bytes, where the tokens cover every byte of a text: those of byte-level BPE, and of BPE
    with bytes for unknown characters. Other models have one token for an unknown word of any length, or drop spaces.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # A class of a model's own code may encode in a way of its own.
    if not isinstance(backend, Tokenizer) or not type(tokenizer).__module__.startswith("transformers."):
        return None
    spec = json.loads(backend.to_str())
    model, added = spec["model"], spec["added_tokens"]
    per_character = _most_characters(spec["normalizer"])
    if model["type"] != "BPE" or per_character is None or any(token["lstrip"] or token["rstrip"] for token in added):
        return None
    splits = _parts(spec["pre_tokenizer"], "pretokenizers")
    if not all(_keeps_all(split) for split in splits):
        return None
    if any(split["type"] == "ByteLevel" for split in splits):
        covers_bytes = set(pre_tokenizers.ByteLevel.alphabet()) <= model["vocab"].keys()
        lengths = [len(token) for token in model["vocab"]]  # a character stands for a byte
    else:
        covers_bytes = model["byte_fallback"] and model["vocab"].keys() >= _BYTES
        lengths = [len(token.encode()) for token in model["vocab"]]
    longest = max(*lengths, *(len(token["content"].encode()) for token in added), 1)
    return longest * per_character if covers_bytes else None


def _most_characters(normalizer: dict[str, Any] | None) -> int | None:
    """What a character that is normalized was before; None where that has no end."""
    most = 1
    for part in _parts(normalizer, "normalizers"):
        if part["type"] == "NFC":
            most *= _CHARACTERS_OF_NFC
        elif part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"]:
            continue
        elif part["type"] != "Prepend":
            return None
    return most


def _keeps_all(split: dict[str, Any]) -> bool:
    return split["type"] in ("ByteLevel", "Digits", "Metaspace") or (
        split["type"] == "Split" and split["behavior"] != "Removed"
    )


def _parts(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """Those of a sequence, or the one."""
    if part is None:
        return []
    return [inner for each in part[name] for inner in _parts(each, name)] if part["type"] == "Sequence" else [part]
