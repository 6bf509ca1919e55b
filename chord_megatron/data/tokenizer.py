"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from chord_megatron.system.errors import UserError

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(model_dir: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a Hugging Face directory; it must have an end token. Raises UserError."""
    # Without any of these transformers 5 builds an empty tokenizer, for which every text has no tokens.
    if not (trust_remote_code or any((model_dir / name).is_file() for name in _VOCABULARY_FILES)):
        raise UserError(
            f"{model_dir} has no tokenizer (none of {', '.join(_VOCABULARY_FILES)}); "
            "copy tokenizer.json and tokenizer_config.json of the model there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{model_dir} has no tokenizer that transformers can load ({reason}); "
            "copy tokenizer.json and tokenizer_config.json of the model there"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {model_dir} has no eos_token; set one in tokenizer_config.json")
    return tokenizer
