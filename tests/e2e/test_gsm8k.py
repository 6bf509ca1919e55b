"""The GSM8K recipe on the real data with a tiny model: everything a run does, for three steps at TP 2."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from harness import read_lines, read_metrics, read_state, succeeded, train_on_two
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from chord_megatron.cli import app

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "examples" / "gsm8k" / "gsm8k.yaml"
DATA = REPOSITORY.parent / "shared" / "data" / "gsm8k"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.distributed,
    pytest.mark.skipif(not (DATA / "test.jsonl").is_file(), reason=f"GSM8K is not in {DATA}"),
]


def write_head(source: Path, count: int, target: Path) -> Path:
    with source.open(encoding="utf-8") as file:
        target.write_text("".join(itertools.islice(file, count)), encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def trained(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a finished run in run/, its rollouts in rollouts.jsonl."""
    root = tmp_path_factory.mktemp("gsm8k")
    train = write_head(DATA / "train.jsonl", 64, root / "train.jsonl")
    test = write_head(DATA / "test.jsonl", 32, root / "test.jsonl")
    overrides = {
        "model.path": assets / "model",
        "model.dtype": "float32",
        "data.dataset": train,
        "data.eval_dataset": test,
        "data.num_eval_prompts": 8,
        "data.max_prompt_length": 768,  # in bytes here
        "rollout.num_generations": 4,
        "rollout.max_completion_length": 12,
        "rollout.record_to": root / "rollouts.jsonl",
        # Random text is neither right nor ever ended: let it differ in reward, and count.
        "rewards.reward_funcs": f"[accuracy, '{assets / 'rewards.py'}:letters']",
        "grpo.overlong_filter": "false",
        "chord.chord_sft_dataset": train,
        "chord.chord_sft_global_batch_size": 6,
        "chord.chord_sft_max_length": 1024,
        "chord.chord_mu_decay_steps": 4,
        "optimizer.lr": 1e-3,
        "optimizer.lr_warmup_iters": 1,
        "train.output_dir": root / "run",
        "train.global_batch_size": 8,
        "train.micro_batch_size": 4,
        "train.train_iters": 3,
        "train.eval_steps": 2,
        "train.save_steps": 1,
    }
    arguments = [f"{key}={value}" for key, value in overrides.items()]
    outcome = succeeded(train_on_two(RECIPE, *arguments))
    assert f"model: {root / 'run' / 'hf' / 'step_3'}\n" in outcome.stdout
    return root


def test_every_step_learns_from_both_streams(trained: Path):
    steps = [line for line in read_metrics(trained / "run") if "loss" in line]
    assert [line["step"] for line in steps] == [0, 1, 2]
    for line in steps:
        assert all(math.isfinite(value) for value in line.values() if value is not None)
        assert line["num_expert_tokens"] > 0 and line["num_rollout_tokens"] > 0
        assert line["loss_expert"] > 0 and line["grad_norm"] > 0
        assert line["reward_std"] > 0 and line["reward/accuracy"] == 0
        assert line["skipped_steps"] == 0
    # 0.05 + 0.85 (1 + cos(pi s / 4)) / 2
    assert [line["mu"] for line in steps] == pytest.approx([0.9, 0.7755204, 0.475])
    assert [line["lr"] for line in steps] == pytest.approx([0, 1e-3, 1e-3])
    assert read_state(trained / "run", 3)["trainer"]["expert_cursor"]["position"] == 18


def test_held_out_questions_are_answered(trained: Path):
    evaluations = [line for line in read_metrics(trained / "run") if "loss" not in line]
    assert [line["step"] for line in evaluations] == [0, 2, 3]
    assert all(line["eval_reward/accuracy"] == 0 for line in evaluations)
    rows = [row for row in read_lines(trained / "run" / "completions.jsonl") if row.get("split") == "eval"]
    assert len(rows) == 3 * 8
    assert {row["reference"] for row in rows} <= {row["answer"] for row in read_lines(trained / "test.jsonl")}
    assert all("Reason step by step." in row["prompt"] for row in rows)


@torch.no_grad()
def test_transformers_gives_the_exported_model_the_samplers_log_probs(trained: Path):
    """The rollouts of step 2 were drawn from the weights after two steps, on two tensor-parallel ranks."""
    model = AutoModelForCausalLM.from_pretrained(trained / "run" / "hf" / "step_2", dtype=torch.float32)
    rollouts = [line for line in read_lines(trained / "rollouts.jsonl") if line["step"] == 2]
    assert [line["policy_version"] for line in rollouts] == [2] * 8
    for line in rollouts:
        tokens, mask = torch.tensor(line["tokens"]), torch.tensor(line["response_mask"])
        log_probs = model(tokens[None, :-1]).logits[0].log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)
        expected = torch.tensor(line["rollout_log_probs"])
        torch.testing.assert_close(log_probs[mask[1:]], expected[mask], rtol=0, atol=1e-4)


def test_the_exported_folder_holds_all_that_generating_needs(trained: Path):
    export = trained / "run" / "hf" / "step_3"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2 + 2?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, do_sample=False, max_new_tokens=4)
    assert output.shape[1] - prompt["input_ids"].shape[1] in range(1, 5)
    assert json.loads((export / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_the_run_folder_is_complete(trained: Path):
    run = trained / "run"
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")
    assert list((run / "tensorboard").iterdir())
    for folder in ("checkpoints", "hf"):  # the recipe keeps two
        assert {path.name for path in (run / folder).iterdir() if path.is_dir()} == {"step_2", "step_3"}
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0 and str(run / "report.html") in result.stdout
