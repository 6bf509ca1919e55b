"""A tokenizer of code and a vocabulary file of its own goes wherever the weights go, and can be loaded there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from harness import succeeded, train_here
from transformers import AutoTokenizer

from chord_megatron.checkpoints.conversion import hf_to_megatron, megatron_to_hf

pytestmark = [pytest.mark.attack, pytest.mark.e2e]

TOKENIZATION = """
from transformers import PreTrainedTokenizer

from .own_vocabulary import read_vocabulary


class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "own.symbols"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, **kwargs):
        self.symbols = read_vocabulary(vocab_file)
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.symbols)

    def get_vocab(self):
        return {**{symbol: index for index, symbol in enumerate(self.symbols)}, **self.added_tokens_encoder}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.symbols.index(token) if token in self.symbols else 0

    def _convert_id_to_token(self, index):
        return self.symbols[index] if index < len(self.symbols) else ""  # the model has rows without a token

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        raise NotImplementedError
"""
VOCABULARY = """
def read_vocabulary(path):
    with open(path, encoding="utf-8") as file:
        return file.read().splitlines()
"""
SYMBOLS = ["?", *map(chr, range(32, 127)), "<end>"]


@pytest.fixture
def model(assets: Path, tmp_path: Path) -> Path:
    """The tiny model with this tokenizer in place of its own."""
    folder = tmp_path / "own_model"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(assets / "model" / name, folder)
    (folder / "tokenization_own.py").write_text(TOKENIZATION)
    (folder / "own_vocabulary.py").write_text(VOCABULARY)
    (folder / "own.symbols").write_text("\n".join(SYMBOLS) + "\n")
    settings = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
        "eos_token": "<end>",
        "chat_template": "{{ messages[0].content }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_it_loads_from_exports_checkpoints_and_conversions(
    model: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    override = (f"model.path={model}", "model.trust_remote_code=true", "train.train_iters=1", "train.save_steps=1")
    succeeded(train_here(config, *override))
    export, checkpoint = tmp_path / "run" / "hf" / "step_1", tmp_path / "run" / "checkpoints" / "step_1"
    megatron_to_hf(checkpoint, tmp_path / "from_run")
    hf_to_megatron(export, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "from_megatron")
    shutil.rmtree(model)
    for folder in (export, checkpoint, tmp_path / "from_run", tmp_path / "megatron", tmp_path / "from_megatron"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert tokenizer.encode("AB", add_special_tokens=False) == [SYMBOLS.index("A"), SYMBOLS.index("B")], folder
        assert tokenizer.eos_token_id == len(SYMBOLS) - 1
        assert tokenizer.chat_template == "{{ messages[0].content }}"
