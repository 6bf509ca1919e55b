"""Damaged bytes in whatever a run reads: they are read, or one sentence says what is wrong; no other exception."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mutations import check_damaged

from chord_megatron.config import load_config
from chord_megatron.evaluation.records import EvaluationFile
from chord_megatron.evaluation.results import summary
from chord_megatron.planning.resuming import changes
from chord_megatron.rollout.recorded_routing import RoutingForm, encode
from chord_megatron.rollout.replay import ReplayRollout, RolloutRecorder
from chord_megatron.system.errors import UserError
from chord_megatron.tracking.completions import read_completions
from chord_megatron.tracking.expert_rows import read_visits
from chord_megatron.tracking.plots import draw_history
from chord_megatron.tracking.run_dir import RunDir
from chord_megatron.tracking.run_log import RunLog
from chord_megatron.tracking.summary import load_history, summarize_history, summary_rows
from chord_megatron.tracking.trackers.memory import Memory
from chord_megatron.types import LIVE, Prompt, RolloutRequest, SamplingParams

pytestmark = pytest.mark.attack

CONFIG = b"""# a comment
model: {path: some/model, dtype: float32}
data:
  dataset: prompts.jsonl
  reference_pattern: '####\\s*(.+)'
rollout: &r
  num_generations: 4
  temperature: 0.7
  stop_token_ids: [2, 5]
optimizer: {lr: 1e-6, adam_beta2: 0.95}
chord: {chord_mu_peak: 0.9, chord_mu_decay_steps: 4, chord_sft_dataset: "experts.jsonl"}
train: {output_dir: out, global_batch_size: 16, train_iters: 3}
"""
OVERRIDES = b"optimizer.lr=1e-6\nrollout.stop_token_ids=[1, 2]\nmodel.recompute=true\ndata.system_prompt='x y'"


def json_lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FORM = RoutingForm(num_layers=2, top_k=2, num_experts=4)
ROUTING = encode(torch.tensor([[[0, 3], [2, 1]]] * 3 + [[[LIVE, LIVE]] * 2], dtype=torch.int16))
RECORDING = json_lines(
    [
        {
            "step": step,
            "prompt_id": 3,
            "sample_index": index,
            "tokens": [5, 6, 11, 49],
            "response_mask": [False, False, True, True],
            "rollout_log_probs": [0.0, 0.0, -0.5, None],
            "policy_version": step,
            "finish_reason": "stop",
            "routing": ROUTING,
        }
        for step in (0, 1)
        for index in (0, 1)
    ]
)
METRICS = json_lines(
    [
        {"step": 0, "eval_reward_mean": 0.25, "eval_reward/format": 1.0},
        *(
            {
                "step": step,
                "loss": 0.5,
                "loss_rollout": 0.1,
                "reward_mean": 0.25,
                "entropy": None,
                "num_rollout_tokens": 40,
                "tokens_per_second": 12.5,
                "time_step": 2.0,
                "time_train": 1.5,
            }
            for step in range(4)
        ),
        {"step": 4, "eval_reward_mean": 0.5},
    ]
)
COMPLETIONS = json_lines(
    [
        {"step": step, "prompt_id": 1, "prompt": "1 + 1", "completion": "2 é", "reference": "2", "reward": 1.0, **split}
        for step in (0, 1)
        for split in ({}, {"split": "eval"})
    ]
)
EXPERTS = json_lines(
    [{"step": step, "id": row, "log_prob": -1.5, "phi": 0.25, "shift": 0.0} for step in (0, 1) for row in (3, 4)]
)

DRAWN = {
    "completion": "it is 7",
    "answer": "7",
    "reward": 1.0,
    "rewards": {"accuracy": 1.0},
    "reward_errors": 0,
    "tokens": 4,
    "finish_reason": "stop",
}
SETTINGS = {"model": "m", "num_prompts": 3, "k": 1, "reward_funcs": ["accuracy"], "temperature": 0.5}
EVALUATION = json_lines(
    [
        {"settings": SETTINGS},
        *({"prompt_id": n, "source": "s", "prompt": "p", "reference": "7", "completions": [DRAWN]} for n in (0, 1)),
    ]
)


def evaluate_on(path: Path) -> None:
    with EvaluationFile(path, SETTINGS) as file:
        if file.rows:
            summary(file.rows, ("accuracy", 1.0))


def read_overrides(path: Path) -> None:
    config = path.with_name("minimal.yaml")
    config.write_bytes(CONFIG)
    text = path.read_bytes().decode("utf-8", "surrogateescape")  # as Python decodes arguments
    load_config(config, text.split("\n"))


def replay(path: Path) -> None:
    engine = ReplayRollout(path, vocab_size=50, routing=FORM)
    for step in (0, 1):
        engine.generate(RolloutRequest([Prompt(3, "", (5, 6), "")], SamplingParams(), 2, step, step))


def resume(path: Path) -> None:
    RunLog(path.parent, train_iters=8, report_to=(), resume_step=2, stream=io.StringIO()).close()


def summarize(path: Path) -> None:
    summary_rows(summarize_history(load_history(path.parent)))


def refuse_other_run(path: Path) -> None:
    minimal = path.with_name("minimal.yaml")
    minimal.write_bytes(CONFIG)
    changes(RunDir(path.parent).settings(), load_config(minimal), "run")


def latest_step(path: Path) -> None:
    RunDir(path.parents[1]).resume_step()


class Input(NamedTuple):
    """A file that a run reads: its place in the run's directory, what a good one holds, and who reads it."""

    file: str
    valid: bytes
    load: Callable[[Path], object]
    examples: int = 150
    is_refused: bool = True  # where most damage is; else it means something, such as that a run is not finished


INPUTS = {
    "configuration": Input("config.yaml", CONFIG, load_config),
    "overrides": Input("overrides", OVERRIDES, read_overrides),
    "recording, replayed": Input("rollouts.jsonl", RECORDING, replay),
    "recording, resumed": Input("rollouts.jsonl", RECORDING, lambda path: RolloutRecorder(path, resume_step=1).close()),
    "metrics, resumed": Input("metrics.jsonl", METRICS, resume),
    "metrics, summed up": Input("metrics.jsonl", METRICS, summarize),
    "metrics, drawn": Input("metrics.jsonl", METRICS, lambda path: draw_history(load_history(path.parent), "x"), 15),
    "completions, resumed": Input("completions.jsonl", COMPLETIONS, resume),
    "experts, resumed": Input("experts.jsonl", EXPERTS, resume),
    "completions, shown": Input("completions.jsonl", COMPLETIONS, read_completions),
    "experts, shown": Input("experts.jsonl", EXPERTS, read_visits),
    "configuration of another run": Input(
        "config.yaml", b"model: {path: some/model}\ntrain: {seed: 0}\n", refuse_other_run
    ),
    "memory of a tracker": Input("wandb.json", b'{"run_id": "a1", "sent": {"train/loss": 4}}', Memory.read),
    "pointer to the latest checkpoint": Input("checkpoints/latest", b"step_2\n", latest_step),
    "pointer to the best checkpoint": Input(
        "checkpoints/best", b"step_2\n", lambda path: RunDir(path.parents[1]).best_step(), is_refused=False
    ),
    "completions of an evaluation": Input("evaluation.jsonl", EVALUATION, evaluate_on),
    "mark of a run that ended early": Input(
        "checkpoints/finished",
        b"4 early_stopping_patience=2\nstopped early\n",
        lambda path: RunDir(path.parents[1]).ending(4, {"early_stopping_patience": 2}),
        is_refused=False,
    ),
    "mark of a finished run": Input(
        "checkpoints/finished", b"4\n", lambda path: RunDir(path.parents[1]).ending(4, {}), is_refused=False
    ),
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints" / "step_2").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_bytes(METRICS)
    return tmp_path


@pytest.mark.parametrize("name", INPUTS)
def test_what_is_damaged_is_read_or_refused(name: str, run_dir: Path, measure: Callable[[str, int], None]):
    file, valid, load, examples, is_refused = INPUTS[name]
    path = run_dir / file
    path.write_bytes(valid)
    load(path)
    refused = 0

    def check(data: bytes) -> None:
        nonlocal refused
        path.write_bytes(data)
        if path.name != "metrics.jsonl":
            (run_dir / "metrics.jsonl").write_bytes(METRICS)
        try:
            load(path)
        except UserError as error:
            refused += 1
            assert len(str(error)) < 2000 and "\n" not in str(error)

    measure("inputs mutated", check_damaged(valid, examples, check))
    assert refused > examples // 20 or not is_refused  # the damage reaches what is checked
