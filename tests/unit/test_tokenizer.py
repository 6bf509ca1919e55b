"""Loading the tokenizer and the end tokens of a model folder: damage is one sentence that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import write_tokenizer
from transformers import AutoTokenizer

from chord_megatron.data.tokenizer import generation_end_tokens, load_tokenizer
from chord_megatron.system.errors import UserError

REMEDY = "; copy tokenizer.json and tokenizer_config.json of the model there"


def write_folder(folder: Path) -> None:
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))


@pytest.fixture
def folder(tmp_path: Path, make_once: Callable[..., Path]) -> Path:
    return Path(shutil.copytree(make_once("tokenizer", write_folder), tmp_path / "model"))


def load(folder: Path) -> Any:
    return load_tokenizer(folder, trust_remote_code=False)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def test_long_texts_are_left_to_the_limits_of_the_configuration(folder: Path, caplog: Any) -> None:
    """And not warned of in words of the library."""
    edit(folder / "tokenizer_config.json", model_max_length=2)
    with caplog.at_level("WARNING"):
        assert len(load(folder).encode("a b a b a b")) > 2
    assert caplog.text == ""


def test_a_whole_one(folder: Path) -> None:
    tokenizer = load(folder)
    assert (tokenizer.encode("a b"), tokenizer.eos_token_id) == ([0, 1], 2)


# File and its content; what the sentence says of it.
DAMAGED = {
    "cut off": ("tokenizer.json", b'{"version": "1.0", "model"', "tokenizer.json is not valid JSON"),
    "empty": ("tokenizer.json", b"", "tokenizer.json is not valid JSON"),
    "binary": ("tokenizer.json", b"\x00\xff\xfe", "tokenizer.json is not valid JSON"),
    "a Git LFS pointer": (
        "tokenizer.json",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n",
        "tokenizer.json is a Git LFS pointer, not the file; run `git lfs pull` there",
    ),
    "a list": ("tokenizer.json", b"[]", "tokenizer.json does not hold a JSON object"),
    "nested without end": ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json is not valid JSON"),
    "no model in it": ("tokenizer.json", b'{"version": "1.0"}', "tokenizer.json: "),
    "of a later release": (
        "tokenizer.json",
        b'{"version": "1.0", "added_tokens": [], "model": {"type": "Quantum", "vocab": {}}}',
        "tokenizer.json: ",
    ),
    "settings cut off": ("tokenizer_config.json", b'{"eos_token": ', "tokenizer_config.json is not valid JSON"),
    "settings of another type": ("tokenizer_config.json", b'"LlamaTokenizer"', "tokenizer_config.json does not hold"),
    "a class that is a number": ("tokenizer_config.json", b'{"tokenizer_class": 5}', "tokenizer_config.json: "),
    "tokens that are numbers": ("tokenizer_config.json", b'{"extra_special_tokens": [5]}', "tokenizer_config.json: "),
    "special tokens that are lists": ("special_tokens_map.json", b'{"eos_token": [1]}', "special_tokens_map.json"),
    "a template in another encoding": (
        "chat_template.jinja",
        b"\xff\xfeh\x00i\x00",
        "chat_template.jinja is not UTF-8",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_named(folder: Path, damage: str) -> None:
    name, content, message = DAMAGED[damage]
    if name == "special_tokens_map.json":  # read where the settings do not say more
        (folder / "tokenizer_config.json").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as refusal:
        load(folder)
    text = str(refusal.value)
    assert text.startswith(f"{folder} has no tokenizer that transformers can load (") and message in text
    assert text.endswith(REMEDY) and len(text) < len(str(folder)) + 450


def test_a_panic_of_the_library_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rust's panics arrive as an exception that is no Exception."""
    panic = type("PanicException", (BaseException,), {})

    def from_pretrained(*args: object, **kwargs: object) -> None:
        raise panic("index out of bounds")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(UserError, match=r"index out of bounds\); copy"):
        load(folder)


def test_an_interrupt_stays_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(KeyboardInterrupt):
        load(folder)


def test_a_tokenizer_that_knows_no_token_is_none(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"], document["added_tokens"] = {}, []
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="has no tokenizer that transformers can load"):
        load(folder)


def test_damage_that_shows_in_use_is_named(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", model_max_length="many")
    with pytest.raises(
        UserError, match=r"has no tokenizer that transformers can load \(.*tokenizer_config.json: TypeE"
    ):
        load(folder)


def test_no_end_token(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match=r"has no eos_token; set one in tokenizer_config\.json"):
        load(folder)


def test_an_end_token_that_the_vocabulary_lacks_is_added(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token="<other>")
    assert load(folder).eos_token_id == 3


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        ({"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [9, 7, 9]}, (9, 7)),
        ({"eos_token_id": []}, ()),
        ({"eos_token_id": None}, ()),
        ({"temperature": 0.6}, ()),
    ],
    ids=str,
)
def test_end_tokens_of_the_generation_config(tmp_path: Path, content: dict[str, Any], tokens: tuple[int, ...]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert generation_end_tokens(tmp_path) == tokens


def test_without_a_generation_config_there_are_none(tmp_path: Path) -> None:
    assert generation_end_tokens(tmp_path) == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"eos_token_id": ', "generation_config.json is not valid JSON"),
        (b"\xff\xfe", "generation_config.json is not valid JSON"),
        (b"[" * 100_000, "generation_config.json is not valid JSON"),
        (b"[1]", "generation_config.json does not hold a JSON object"),
        (b'{"eos_token_id": "</s>"}', "`eos_token_id` must be a token id or a list of them, found '</s>'"),
        (b'{"eos_token_id": [1, "2"]}', r"`eos_token_id` must be a token id or a list of them, found \[1, '2'\]"),
        (b'{"eos_token_id": true}', "`eos_token_id` must be a token id or a list of them, found True"),
        (b'{"eos_token_id": 1.5}', "`eos_token_id` must be a token id or a list of them, found 1.5"),
        (b'{"eos_token_id": {"id": 1}}', "`eos_token_id` must be a token id or a list of them"),
    ],
)
def test_a_damaged_generation_config_is_a_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        generation_end_tokens(tmp_path)
    assert str(tmp_path) in str(refusal.value) and "remove the file" in str(refusal.value)
