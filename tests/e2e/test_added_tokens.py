"""Tokens that were added to a tokenizer and not to its model: refused whatever the layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from harness import succeeded, train_here, train_on_forks, write_rows
from safetensors.torch import load_file, save_file
from tiny_model import byte_tokenizer

pytestmark = pytest.mark.e2e


@pytest.fixture
def model(assets: Path, tmp_path: Path) -> Path:
    """The tiny model, whose tokenizer has a token more: 261, of which the model has no row."""
    folder = Path(shutil.copytree(assets / "model", tmp_path / "model"))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("train", [train_here, train_on_forks], ids=["TP 1", "TP 2"])
def test_an_added_token_in_the_data_is_refused(train, model: Path, assets: Path, config: Path, tmp_path: Path):
    rows = [{"prompt": "1 + 2 =", "answer": "3"}, {"prompt": "1 <|more|> 2 =", "answer": "3"}]
    write_rows(tmp_path / "more.jsonl", rows * 12)
    layout = ("parallel.tensor_model_parallel_size=2",) if train is train_on_forks else ()
    outcome = train(config, f"model.path={model}", f"data.dataset={tmp_path / 'more.jsonl'}", *layout)
    assert outcome.code == 2
    (error,) = outcome.errors
    assert error.startswith(f"error: {tmp_path}/more.jsonl row 1 has token 261, of which a model of vocab_size 261 has")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_added_token_that_never_occurs_is_none(model: Path, config: Path):
    succeeded(train_here(config, f"model.path={model}", "train.train_iters=1"))


def test_a_model_with_the_rows_trains(model: Path, config: Path, tmp_path: Path):
    weights = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][[*range(261), 260]].contiguous()
    save_file(weights, model / "model.safetensors")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "vocab_size": 262}))
    write_rows(tmp_path / "more.jsonl", [{"prompt": "1 <|more|> 2 =", "answer": "3"}] * 24)
    succeeded(
        train_here(config, f"model.path={model}", f"data.dataset={tmp_path / 'more.jsonl'}", "train.train_iters=1")
    )
