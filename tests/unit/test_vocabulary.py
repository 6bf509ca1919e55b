"""Token ids that the model has no row for: refused by one sentence before anything is started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tiny_tokenizer import write_tokenizer
from typer.testing import CliRunner

from chord_megatron.cli import app
from chord_megatron.config import Config
from chord_megatron.data.vocabulary import check_vocabulary
from chord_megatron.system.errors import UserError
from chord_megatron.types import ExpertSample, Prompt

VOCAB_SIZE = 10
ROWS_REMEDY = (
    "; use the tokenizer that belongs to the model, or give the added tokens rows of their own by transformers' "
    "resize_token_embeddings(len(tokenizer))"
)


def configured(model: Path, **rollout: Any) -> Config:
    settings = {
        "model": {"path": str(model)},
        "data": {"dataset": "prompts.jsonl", "eval_dataset": "held_out.jsonl"},
        "rollout": rollout,
        "chord": {"chord_sft_dataset": "experts.jsonl"},
        "train": {"output_dir": "out", "global_batch_size": 8, "train_iters": 1},
    }
    return Config.model_validate(settings)


def prompts(*tokens: tuple[int, ...]) -> list[Prompt]:
    return [Prompt(10 + i, "", row, "") for i, row in enumerate(tokens)]


def data(**rows: Any) -> Any:
    whole = {"prompts": prompts((1, 9)), "eval_prompts": [], "experts": [ExpertSample(5, (1, 9), 1)]}
    return SimpleNamespace(end_token_ids=frozenset({9}), **whole | rows)


def check(tmp_path: Path, eos: int = 9, run_data: Any = None, **rollout: Any) -> None:
    check_vocabulary(configured(tmp_path, **rollout), SimpleNamespace(eos_token_id=eos), VOCAB_SIZE, run_data)


def refusal(*arguments: Any, **named: Any) -> str:
    with pytest.raises(UserError) as error:
        check(*arguments, **named)
    return str(error.value)


def test_the_last_row_of_the_model_is_one(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 0]}')
    check(tmp_path, run_data=data(), stop_token_ids=None)
    check(tmp_path, run_data=data(), stop_token_ids=[0, 9])


@pytest.mark.parametrize(
    ("rows", "where", "token", "largest"),
    [
        ({"prompts": prompts((1, 2), (3, 10, 12), (14,))}, "prompts.jsonl row 11", 10, 14),
        ({"eval_prompts": prompts((10,))}, "held_out.jsonl row 10", 10, 10),
        ({"experts": [ExpertSample(5, (1, 2), 1), ExpertSample(6, (1, 2, 11), 1)]}, "experts.jsonl row 6", 11, 11),
    ],
    ids=["prompts", "held-out prompts", "experts"],
)
def test_rows_are_named(tmp_path: Path, rows: dict[str, Any], where: str, token: int, largest: int) -> None:
    assert refusal(tmp_path, run_data=data(**rows)) == (
        f"{where} has token {token}, of which a model of vocab_size 10 has no row (the largest here is {largest})"
        + ROWS_REMEDY
    )


def test_end_tokens_are_named(tmp_path: Path) -> None:
    assert refusal(tmp_path, eos=10).startswith("the tokenizer's eos_token has token 10, of which a model of")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 12]}')
    assert refusal(tmp_path).startswith(f"{tmp_path}/generation_config.json has token 12, of which a model of")
    check(tmp_path, stop_token_ids=[9])  # then it is not read


def test_the_templates_end_of_a_turn_is_named(tmp_path: Path) -> None:
    rows = data()
    rows.end_token_ids = frozenset({10})
    assert refusal(tmp_path, run_data=rows).startswith("the chat template's end of a turn has token 10, of which a")


CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 2,  # the end token has id 2
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}


@pytest.fixture
def command(tmp_path: Path, make_once: Callable[..., Path]) -> Callable[..., Any]:
    """Runs a command of chord-megatron on a model folder that lacks weights."""
    model = tmp_path / "model"
    write_tokenizer(model)
    (model / "config.json").write_text(json.dumps(CONFIG))
    settings = {
        "model": {"path": str(model)},
        "data": {"dataset": "prompts.jsonl"},
        "chord": {"chord_mu_peak": 0, "chord_mu_valley": 0},
        "train": {"output_dir": str(tmp_path / "out"), "global_batch_size": 8, "train_iters": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return lambda name, *more: CliRunner().invoke(app, [name, str(tmp_path / "run.yaml"), *more])


def test_validate_looks_at_the_end_tokens(command: Callable[..., Any], tmp_path: Path) -> None:
    result = command("validate")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "error: the tokenizer's eos_token has token 2, of which a model of vocab_size 2 has no row (the largest here "
        f"is 2){ROWS_REMEDY}\n"
    )
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    result = command("validate")
    assert result.exit_code == 2 and "tokenizer.json is not valid JSON" in result.stderr
