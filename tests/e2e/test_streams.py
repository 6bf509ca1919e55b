"""The two streams of a run on one process: replayed rollouts, mu at its ends, and several steps a generation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import (
    Outcome,
    read_lines,
    read_metrics,
    read_state,
    succeeded,
    train_here,
    train_on_forks,
    weight_bytes,
    write_config,
    write_rows,
)

from chord_megatron.ops.linear_log_probs import linear_log_probs

pytestmark = pytest.mark.e2e


def fixed_mu(mu: float) -> tuple[str, str]:
    return f"chord.chord_mu_peak={mu}", f"chord.chord_mu_valley={mu}"


@pytest.fixture(scope="module")
def recorded(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps; what it recorded lies beside it."""
    root = tmp_path_factory.mktemp("recorded")
    recording = root / "rollouts.jsonl"
    succeeded(train_here(write_config(assets, root), "train.train_iters=2", f"rollout.record_to={recording}"))
    return root / "run"


@pytest.fixture
def recording(recorded: Path) -> Path:
    return recorded.with_name("rollouts.jsonl")


def replay(config: Path, recording: Path, *overrides: str) -> Outcome:
    """Two steps from a recording, into the folder of `config`."""
    return train_here(
        config, "train.train_iters=2", "rollout.engine=replay", f"rollout.replay_from={recording}", *overrides
    )


def test_a_replayed_run_is_the_recorded_one(config: Path, recorded: Path, recording: Path, tmp_path: Path):
    lines = read_lines(recording)
    assert [(line["step"], line["sample_index"]) for line in lines] == [(s, i) for s in (0, 1) for i in range(8)]
    assert [line["policy_version"] for line in lines] == [0] * 8 + [1] * 8

    recorded_again = tmp_path / "again.jsonl"
    succeeded(replay(config, recording, f"rollout.record_to={recorded_again}"))

    assert read_metrics(tmp_path / "run") == read_metrics(recorded)
    assert weight_bytes(tmp_path / "run", 2) == weight_bytes(recorded, 2)
    assert recorded_again.read_bytes() == recording.read_bytes()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.seed=1",), "; use the data, tokenizer and seed of the run that recorded it"),
        (
            ("train.global_batch_size=4",),
            "holds 8 completions for step 0, but the run asks for 4; use the batch sizes of the run that recorded it",
        ),
        (
            ("train.train_iters=3",),
            "holds 0 completions for step 2, but the run asks for 8; use the batch sizes of the run that recorded it",
        ),
    ],
)
def test_a_recording_of_another_run_is_refused(config: Path, recording: Path, overrides: tuple[str, ...], message: str):
    outcome = replay(config, recording, *overrides)
    assert outcome.code == 2
    (error,) = outcome.errors
    assert error.startswith(f"error: {recording}") and error.endswith(message)


def test_a_damaged_recording_names_the_line(config: Path, recording: Path, tmp_path: Path):
    lines = recording.read_text(encoding="utf-8").splitlines()
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text("\n".join([lines[0], '{"step": 0}', *lines[2:]]), encoding="utf-8")
    outcome = replay(config, damaged)
    assert outcome.code == 2
    assert outcome.errors == [f"error: {damaged}:2: lacks 'prompt_id'; record it again with rollout.record_to"]
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_tokens_without_a_number_of_the_sampler_cost_no_step(
    config: Path, recording: Path, tmp_path_factory: pytest.TempPathFactory
):
    """A recording with nulls under a sequence mode, on one process and on two: the same count, and finite losses."""
    root = tmp_path_factory.mktemp("nulls")
    lines = read_lines(recording)
    holes = [0, 0]
    for line in lines:
        if line["sample_index"] % 3 == 0:
            line["rollout_log_probs"][-1] = None
            holes[line["step"]] += 1
    nulls = write_rows(root / "nulls.jsonl", lines)
    # The second step's differences from the sampler are rounding, which rows that share a prompt have another of.
    settings = ("grpo.rollout_importance_sampling_mode=sequence_truncate", "train.share_prompts=false")
    one, two = root / "one", root / "two"
    succeeded(replay(config, nulls, *settings, f"train.output_dir={one}"))
    arguments = ("train.train_iters=2", "rollout.engine=replay", f"rollout.replay_from={nulls}", *settings)
    succeeded(train_on_forks(config, *arguments, f"train.output_dir={two}"))
    for alone, both, count in zip(read_metrics(one), read_metrics(two), holes, strict=True):
        assert alone["non_finite_rollout_log_probs"] == both["non_finite_rollout_log_probs"] == count == 3
        assert alone["skipped_steps"] == both["skipped_steps"] == 0
        for name in ("loss", "log_prob_diff_mean", "importance_weight_mean", "effective_sample_size"):
            assert both[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-6)


def test_mu_1_draws_no_rollouts(config: Path, tmp_path: Path):
    succeeded(train_here(config, "train.train_iters=2", *fixed_mu(1.0)))
    for line in read_metrics(tmp_path / "run"):
        assert line["num_rollout_tokens"] == 0 and line["num_expert_tokens"] > 0
        assert line["loss"] == line["loss_expert"] and line["loss_rollout"] == 0
        assert line["reward_mean"] is None and line["entropy"] is None
    trainer = read_state(tmp_path / "run", 2)["trainer"]
    assert trainer["prompt_cursor"]["position"] == 0 and trainer["expert_cursor"]["position"] == 12
    assert (tmp_path / "run" / "completions.jsonl").read_bytes() == b""


def test_supervised_training_needs_experts_alone(config: Path, tmp_path: Path):
    """No prompts, no number of completions, and no reward function: the one that is named is not there."""
    nothing = ("data.dataset=null", "train.global_batch_size=null", "rewards.reward_funcs=['none.py:function']")
    settings = (*fixed_mu(1.0), "train.train_iters=1", "train.save_steps=null")
    whole = succeeded(train_here(config, *settings, f"train.output_dir={tmp_path / 'whole'}"))
    alone = succeeded(train_here(config, *settings, *nothing, "train.share_prompts=false"))
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")
    assert ", shared prompts: read once in each micro-batch\n" in whole.stdout
    assert ", shared prompts: read by each row\n" in alone.stdout


def test_mu_0_draws_no_expert_rows(config: Path, tmp_path: Path):
    succeeded(train_here(config, "train.train_iters=2", *fixed_mu(0.0)))
    for line in read_metrics(tmp_path / "run"):
        assert line["num_expert_tokens"] == 0 and line["num_rollout_tokens"] > 0
        assert line["loss"] == line["loss_rollout"] and line["loss_expert"] == 0
        assert line["phi_mean"] is None and line["clip_fraction"] == 0
    trainer = read_state(tmp_path / "run", 2)["trainer"]
    assert trainer["prompt_cursor"]["position"] == 4 and trainer["expert_cursor"]["position"] == 0


def test_off_policy_steps_clip_against_the_policy_that_drew(config: Path, tmp_path: Path):
    """Two steps a generation, twice over it: the first step is on-policy, and the clip holds only later ones."""
    recording = tmp_path / "rollouts.jsonl"
    succeeded(
        train_here(
            config,
            "grpo.steps_per_generation=2",
            "grpo.num_iterations=2",
            "grpo.epsilon=1e-4",
            "train.train_iters=8",
            "train.save_steps=4",
            f"rollout.record_to={recording}",
            *fixed_mu(0.5),
        )
    )
    lines = read_metrics(tmp_path / "run")
    clip_fractions = [line["clip_fraction"] for line in lines]
    assert clip_fractions[0] == clip_fractions[4] == 0
    assert sum(clip_fractions[1:4]) > 0 and sum(clip_fractions[5:8]) > 0
    # The trainer's log-probs move away from the sampler's, at rounding distance while on-policy.
    differences = [line["log_prob_diff_mean"] for line in lines]
    assert max(differences[0], differences[4]) < 1e-5 < min(differences[1:4] + differences[5:8])
    # One pass finds old log-probs, those of the second half; the first step itself finds those of the first.
    times = [line["time_log_probs"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert [time > 0 for time in times] == [True, False, False, False] * 2
    # The old log-probs stay with the sampler's, so there is nothing to correct.
    assert all(abs(line["importance_weight_mean"] - 1) < 1e-5 for line in lines)
    assert all(line["effective_sample_size"] > 1 - 1e-9 for line in lines)
    assert all(line["importance_clipped_fraction"] is None for line in lines)

    drawn = read_lines(recording)
    assert [(line["step"], line["policy_version"]) for line in drawn] == [(0, 0)] * 16 + [(4, 4)] * 16
    # Steps 0 and 2 train on the first half of the generation, 1 and 3 on the second.
    tokens = [line["num_rollout_tokens"] for line in lines]
    halves = [sum(sum(line["response_mask"]) for line in drawn[start : start + 8]) for start in (0, 8, 16, 24)]
    assert tokens == halves[:2] * 2 + halves[2:] * 2
    assert read_state(tmp_path / "run", 8)["trainer"]["prompt_cursor"]["position"] == 8


def test_a_checkpoint_of_other_data_is_refused(config: Path, tmp_path: Path, assets: Path):
    rows = read_lines(assets / "prompts.jsonl")
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    succeeded(train_here(config, "train.train_iters=2", f"data.dataset={prompts}"))

    write_rows(prompts, rows[:-1])
    outcome = train_here(config, "train.train_iters=4", f"data.dataset={prompts}")
    assert outcome.code == 2
    assert outcome.errors == [
        f"error: data.dataset={prompts} has other rows than when the run began; restore them, or choose another "
        "train.output_dir"
    ]
    outcome = train_here(config, "train.train_iters=4", f"data.dataset={prompts}", "train.seed=1")
    assert outcome.code == 2
    assert outcome.errors == [
        f"error: {tmp_path / 'run'} holds a run with train.seed=0, but this one has 1; restore it, or choose another "
        "train.output_dir"
    ]


@pytest.mark.parametrize("missing", ["state.json", "__0_0_0.distcp"])
def test_an_incomplete_checkpoint_is_named(missing: str, config: Path, recorded: Path, tmp_path: Path):
    shutil.copytree(recorded, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_2"
    (checkpoint / missing).unlink()

    outcome = train_here(config, "train.train_iters=4")

    assert outcome.code == 2
    [error] = outcome.errors
    assert error.startswith(f"error: the checkpoint {checkpoint} cannot be read (")
    assert missing in error
    assert error.endswith(f"name an earlier one in {checkpoint.parent}/latest")


def test_a_resumed_run_takes_the_new_learning_rate(config: Path, recorded: Path, tmp_path: Path):
    shutil.copytree(recorded, tmp_path / "run")
    succeeded(train_here(config, "train.train_iters=4", "optimizer.lr=2e-4"))
    assert [line["lr"] for line in read_metrics(tmp_path / "run")] == [1e-3, 1e-3, 2e-4, 2e-4]


def test_a_recording_is_not_overwritten(config: Path, recording: Path):
    before = recording.read_bytes()
    outcome = train_here(config, f"rollout.record_to={recording}")
    assert outcome.errors == [
        f"error: rollout.record_to: {recording} holds the rollouts of another run; remove it or name another file"
    ]
    assert recording.read_bytes() == before


def test_passes_without_a_loss_ask_the_head_for_no_entropy(config: Path, monkeypatch: pytest.MonkeyPatch):
    """Reference, two micro-batches; old policy of the second step; the two steps of the generation batch."""
    asked: list[bool] = []

    def observed(*args: Any, compute_entropy: bool, **kwargs: Any) -> Any:
        asked.append(compute_entropy)
        return linear_log_probs(*args, compute_entropy=compute_entropy, **kwargs)

    monkeypatch.setattr("chord_megatron.backend.model.linear_log_probs", observed)
    overrides = ("grpo.steps_per_generation=2", "grpo.beta=0.1", "train.train_iters=2", "train.micro_batch_size=8")
    succeeded(train_here(config, *overrides, *fixed_mu(0.0)))
    assert asked == [False, False, False, True, True]


def test_a_checkpoint_inside_a_generation_batch_is_refused(config: Path, tmp_path: Path):
    """What is left of the batch is not in the checkpoint: training would go on without rollouts."""
    succeeded(train_here(config, "train.train_iters=2", "train.save_steps=2"))
    outcome = train_here(config, "train.train_iters=8", "train.save_steps=4", "grpo.num_iterations=4")
    assert outcome.code == 2
    (error,) = outcome.errors
    assert "step 2 lies inside a generation batch of grpo.steps_per_generation x num_iterations = 4 steps" in error
