"""The tokenizer of a model folder, and the end tokens that its generation settings name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from chord_megatron.system.errors import INTERRUPTIONS, UserError
from chord_megatron.system.files import read_json_object
from chord_megatron.system.sentences import one_line

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEMPLATE = "chat_template.jinja"
_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"
_REMEDY = "copy tokenizer.json and tokenizer_config.json of the model there"


def load_tokenizer(model_dir: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a Hugging Face directory; it must have an end token. Raises UserError."""
    # Without any of these transformers 5 builds an empty tokenizer, for which every text has no tokens.
    if not (trust_remote_code or any((model_dir / name).is_file() for name in _VOCABULARY_FILES)):
        raise UserError(f"{model_dir} has no tokenizer (none of {', '.join(_VOCABULARY_FILES)}); {_REMEDY}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
        if not tokenizer.vocab_size:
            raise ValueError("its vocabulary is empty")
        tokenizer.decode(tokenizer.encode("1"))  # some settings are looked at with the first text only
    except INTERRUPTIONS:
        raise
    except BaseException as error:  # damage fails in every way there is, and a panic in Rust is no Exception
        reason = next(_damages(model_dir), f"{_settings(model_dir)}: {type(error).__name__}: {error}")
        raise UserError(
            f"{model_dir} has no tokenizer that transformers can load ({one_line(reason)}); {_REMEDY}"
        ) from None
    # Lengths are limited, and said, by the configuration; the library warns of the first long text as of a failure.
    getattr(tokenizer, "deprecation_warnings", {})[_TOO_LONG] = True
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {model_dir} has no eos_token; set one in tokenizer_config.json")
    return tokenizer


def generation_end_tokens(model_dir: Path) -> tuple[int, ...]:
    """The end tokens of generation_config.json, in its order; none without the file. Raises UserError."""
    path = model_dir / "generation_config.json"
    if not path.is_file():
        return ()
    remedy = "copy it from the model again, or remove the file and set rollout.stop_token_ids"
    found = read_json_object(path, remedy).get("eos_token_id")
    tokens = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int for token in tokens):
        raise UserError(f"{path}: `eos_token_id` must be a token id or a list of them, found {found!r}; {remedy}")
    return tuple(dict.fromkeys(tokens))


def _damages(model_dir: Path) -> Iterator[str]:
    """What is wrong with the files of a tokenizer, one by one."""
    for path in (model_dir / name for name in _JSON_FILES if (model_dir / name).is_file()):
        try:
            read_json_object(path, "")
        except UserError as error:
            yield str(error).removeprefix(f"{model_dir}/").removesuffix("; ")
    try:
        (model_dir / _TEMPLATE).read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        yield f"{_TEMPLATE} is not UTF-8 text"
    if (model_dir / "tokenizer.json").is_file():
        try:
            Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        except INTERRUPTIONS:
            raise
        except BaseException as error:
            yield f"tokenizer.json: {error}"


def _settings(model_dir: Path) -> str:
    """The files that say how to build a tokenizer."""
    return " or ".join(name for name in _JSON_FILES if name != "tokenizer.json" and (model_dir / name).is_file())
