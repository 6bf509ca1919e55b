"""Twenty steps under each preset of `chord.semantics` against that trainer's formulas: float64, one process."""

from __future__ import annotations

import json
import random
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import preset_reference
import pytest
import torch
from forked import launch
from reference import Step, read_jsonl

from chord_megatron.config import Config

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
QUICKSTART = HERE.parents[1] / "examples" / "quickstart" / "make_quickstart.py"
STEPS = 20
# float32 against float64, whose weights drift apart by rounding. Measured: at most 2e-6.
TOLERANCE = 2e-5
RECORDING = "recording"

MS_SWIFT = {
    "chord.semantics": "ms-swift",
    "chord.chord_sft_per_device_train_batch_size": 2,
    "chord.chord_sft_global_batch_size": None,
    "grpo.loss_type": "grpo",
}
CASES: dict[str, dict[str, Any]] = {
    "ms-swift": MS_SWIFT,
    "ms-swift, phi": {**MS_SWIFT, "chord.chord_enable_phi_function": True},
    "ms-swift, dapo": {**MS_SWIFT, "grpo.loss_type": "dapo"},
    # Completions without an end token are filtered, and count; the penalty has importance weights, too.
    "ms-swift, filter, weighted KL": {
        **MS_SWIFT,
        "grpo.overlong_filter": True,
        "grpo.beta": 0.04,
        "grpo.rollout_importance_sampling_mode": "token_truncate",
        "grpo.rollout_importance_sampling_threshold": 1.01,
    },
    "trinity": {"chord.semantics": "trinity"},
    "trinity, phi": {"chord.semantics": "trinity", "chord.chord_enable_phi_function": True},
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model and task, smaller."""
    root = tmp_path_factory.mktemp("presets")
    make = runpy.run_path(str(QUICKSTART))
    problems = make["sample_problems"](random.Random(0), 12)
    make["write_jsonl"](root / "prompts.jsonl", make["prompt_rows"](problems[:5]))
    make["write_jsonl"](root / "experts.jsonl", make["expert_rows"](problems[5:]))
    torch.manual_seed(0)
    tokenizer = make["build_tokenizer"]()
    model = make["build_model"](tokenizer)
    torch.nn.init.normal_(model.get_input_embeddings().weight[tokenizer.pad_token_id], std=0.05)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root


def make_config(assets: Path, name: str, settings: dict[str, Any]) -> Config:
    """Two prompts of four completions and a few expert rows a step; mu rises, falls and ends at its valley."""
    flat = {
        "model.path": str(assets / "model"),
        "model.dtype": "float32",
        "data.dataset": str(assets / "prompts.jsonl"),
        "data.max_prompt_length": 16,
        "rewards.reward_funcs": [f"{HERE / 'hash_reward.py'}:hash_reward"],
        "rollout.num_generations": 4,
        "rollout.max_completion_length": 24,
        "rollout.temperature": 0.8,
        "chord.chord_sft_dataset": str(assets / "experts.jsonl"),
        "chord.chord_sft_global_batch_size": 6,
        "chord.chord_sft_max_length": 64,
        "chord.chord_mu_peak": 0.9,
        "chord.chord_mu_valley": 0.1,
        "chord.chord_mu_warmup_steps": 3,
        "chord.chord_mu_decay_steps": 10,
        "optimizer.lr": 2e-4,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.train_iters": STEPS,
        "train.output_dir": str(assets / "runs" / name),
        "tracking.report_to": [],
        **settings,
    }
    nested: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        group, leaf = key.split(".")
        nested.setdefault(group, {})[leaf] = value
    return Config.model_validate(nested)


@pytest.fixture(scope="module")
def runs(assets: Path) -> dict[str, Config]:
    """A run that records its rollouts, and one of each case that replays them."""
    recording = str(assets / "rollouts.jsonl")
    replay = {"rollout.engine": "replay", "rollout.replay_from": recording}
    configs = {RECORDING: make_config(assets, RECORDING, {"rollout.record_to": recording})}
    configs |= {case: make_config(assets, case, {**replay, **settings}) for case, settings in CASES.items()}
    path = assets / "configs.json"
    path.write_text(json.dumps([config.model_dump() for config in configs.values()]), encoding="utf-8")
    launch(HERE / "exactness_worker.py", path, processes=1)
    return configs


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_trainer(
    case: str, runs: dict[str, Config], measure: Callable[[str, float], None]
):
    ours, theirs = logged_steps(runs[case]), preset_reference.train(runs[case])
    errors = [
        max(abs(a.loss - b.loss) / max(abs(b.loss), 0.1), abs(a.grad_norm - b.grad_norm) / b.grad_norm)
        for a, b in zip(ours, theirs, strict=True)
    ]
    measure(f"largest error of 20 steps, {case}", max(errors))
    assert max(errors) <= TOLERANCE, errors


def test_the_presets_differ(runs: dict[str, Config]):
    """What the comparison rests on: no two cases have the same loss, at the second step and at the last."""
    for step in (1, STEPS - 1):
        losses = [logged_steps(config)[step].loss for name, config in runs.items() if name != RECORDING]
        assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-4


def logged_steps(config: Config) -> list[Step]:
    """What a run logged of its steps."""
    lines = read_jsonl(Path(config.train.output_dir) / "metrics.jsonl")
    return [Step(line["loss"], line["grad_norm"]) for line in lines]
