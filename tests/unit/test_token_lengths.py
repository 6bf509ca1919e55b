"""Prompts that are dropped for their length anyway are not tokenized first: an exact bound, or none."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chord_megatron.config import ChordConfig, DataConfig
from chord_megatron.data.load import load_run_data
from chord_megatron.data.token_lengths import characters_per_token
from chord_megatron.system.errors import UserError

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPLIT = r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def byte_level(*, normalizer: Any = None, pre: Any = None, missing: int = 0, **added: bool) -> PreTrainedTokenizerFast:
    """Of the 256 bytes, `aaaaaaaa`, and an end token of 7 characters."""
    vocabulary = {token: number for number, token in enumerate([*BYTES[missing:], "aa", "aaaa", "aaaaaaaa"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "a"), ("aa", "aa"), ("aaaa", "aaaa")]))
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken("<|end|>", **added)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE)


def byte_fallback(**options: Any) -> PreTrainedTokenizerFast:
    """As SentencePiece's of Llama 2: characters, and bytes for all others."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁▁▁▁"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True, **options))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>")


TEMPLATE = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
QWEN = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
)
BOUNDED = {
    "bytes": (byte_level(), 8),
    "bytes, NFC": (byte_level(normalizer=normalizers.NFC(), pre=QWEN), 32),
    "bytes, no normalizers": (byte_level(normalizer=normalizers.Sequence([])), 8),
    "bytes for other characters": (byte_fallback(), 12),
}


@pytest.mark.parametrize("name", BOUNDED)
@given(text=st.text() | st.text("aÅ\u0327\u0301\u1100\u1161\u11a8 \n", max_size=300))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_no_text_has_fewer_tokens_than_the_bound_says(name: str, text: str) -> None:
    tokenizer, bound = BOUNDED[name]
    assert characters_per_token(tokenizer) == bound
    text = text.encode(errors="ignore").decode()
    assert len(text) <= bound * len(tokenizer.encode(text, add_special_tokens=False))


def test_the_bound_is_reached() -> None:
    assert len(byte_level().encode("a" * 8000)) == 1000


def test_a_character_in_nfc_is_at_most_four() -> None:
    lengths = {len(unicodedata.normalize("NFD", chr(code))) for code in range(0x110000) if not 0xD800 <= code < 0xE000}
    assert max(lengths) == 4


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(missing=1),
        byte_level(normalizer=normalizers.NFKC()),
        byte_level(normalizer=normalizers.Strip()),
        byte_level(normalizer=normalizers.Replace(Regex("a+"), "a")),
        byte_level(pre=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])),
        byte_level(pre=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])),
        byte_level(rstrip=True),
        byte_level(lstrip=True),
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), eos_token="a"),
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], 0, False)), eos_token="a"),
        type("Own", (PreTrainedTokenizerFast,), {})(
            tokenizer_object=byte_level().backend_tokenizer, eos_token="<|end|>"
        ),
        object(),
    ],
)
def test_without_a_bound_everything_is_tokenized(tokenizer: Any) -> None:
    """Where spaces are dropped, characters are unknown or merged, or encoding is of code of its own."""
    assert characters_per_token(tokenizer) is None


@pytest.mark.parametrize(
    ("prompt_format", "prompts", "experts"),
    [("text", [(0, 10), (1, 11)], [(0, 12), (1, 13)]), ("chat", [(0, 11), (1, 12)], [(0, 13)])],
)
def test_what_is_dropped_anyway_is_not_tokenized(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompt_format: Any,
    prompts: list[tuple[int, int]],
    experts: list[tuple[int, int]],
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": "a" * length, "answer": "b"} for length in (80, 81, 10**6, 640)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, encoded = byte_level(), [0]
    encode = tokenizer.encode

    def record(text: str, **options: Any) -> list[int]:
        encoded.append(len(text))
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", record)
    config = DataConfig(dataset=str(data), max_prompt_length=12, prompt_format=prompt_format)
    loaded = load_run_data(config, ChordConfig(chord_sft_dataset=str(data)), tokenizer, expert_max_length=13)
    assert [(row.id, len(row.tokens)) for row in loaded.prompts] == prompts
    assert [(row.id, len(row.tokens)) for row in loaded.experts] == experts
    assert max(encoded) < 100
    assert f"{data}: dropped 2 rows above data.max_prompt_length=12" in loaded.notes
    assert f"{data}: dropped {4 - len(experts)} rows above chord.chord_sft_max_length=13" in loaded.notes


def test_a_row_that_is_dropped_is_still_looked_at(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a" * 10**6, "answer": None}) + "\n")
    config = DataConfig(dataset=str(tmp_path / "data.jsonl"), max_prompt_length=12, prompt_format="text")
    with pytest.raises(UserError, match=r"data.jsonl:1: column 'answer'"):
        load_run_data(config, ChordConfig(), byte_level(), expert_max_length=13)
