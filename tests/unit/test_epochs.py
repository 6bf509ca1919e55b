"""Runs of epochs, and a warm-up as a share: steps that the data decides. By hand."""

from __future__ import annotations

import pytest

from chord_megatron.config import Config, load_config
from chord_megatron.config_types import LARGEST_INTEGER
from chord_megatron.planning.steps import check_length_of_run, in_steps
from chord_megatron.system.errors import UserError


def config_of(**groups: dict) -> Config:
    given = {
        "model": {"path": "m"},
        "data": {"dataset": "p.jsonl"},
        "chord": {"chord_sft_dataset": "e.jsonl", "chord_sft_global_batch_size": 8},
        "rollout": {"num_generations": 8},
        "train": {"output_dir": "out", "global_batch_size": 256, "num_train_epochs": 1},
    }
    for group, keys in groups.items():
        given[group] = {**given.get(group, {}), **keys}
    return Config.model_validate(given)


@pytest.mark.parametrize(
    ("groups", "prompts", "steps", "line"),
    [
        ({}, 72441, 2263, "2263 steps: 1 epoch of 72441 prompts, 32 a step"),  # 2263.78
        ({"train": {"num_train_epochs": 3}}, 100, 9, "9 steps: 3 epochs of 100 prompts, 32 a step"),  # 300 / 32
        ({"train": {"num_train_epochs": 0.5}}, 128, 2, "2 steps: 0.5 epochs of 128 prompts, 32 a step"),
        ({}, 5, 1, "1 step: 1 epoch of 5 prompts, 32 a step"),
        ({"grpo": {"steps_per_generation": 4}}, 300, 8, "8 steps: 1 epoch of 300 prompts, 32 a step"),  # 2.3 draws
        ({"grpo": {"num_iterations": 3}}, 64, 6, "6 steps: 1 epoch of 64 prompts, 32 a step, 3 times"),
    ],
)
def test_steps_of_epochs(groups: dict, prompts: int, steps: int, line: str):
    config, said = in_steps(config_of(**groups), prompts=prompts, experts=1000, expert_rows_per_step=8)
    assert (config.train.train_iters, config.train.num_train_epochs, said) == (steps, None, line)


def test_at_mu_1_experts_are_counted():
    only_experts = {"chord_mu_peak": 1.0, "chord_mu_valley": 1.0}
    config, line = in_steps(config_of(chord=only_experts), prompts=0, experts=100, expert_rows_per_step=8)
    assert (config.train.train_iters, line) == (12, "12 steps: 1 epoch of 100 expert rows, 8 a step")


@pytest.mark.parametrize(("ratio", "steps", "warmup"), [(0.05, 2263, 114), (0.05, 100, 5), (0.5, 1, 0), (0.0, 7, 0)])
def test_warmup_as_a_share(ratio: float, steps: int, warmup: int):
    given = config_of(optimizer={"lr_warmup_ratio": ratio}, train={"num_train_epochs": None, "train_iters": steps})
    config, line = in_steps(given, prompts=0, experts=0, expert_rows_per_step=0)
    optimizer = config.optimizer
    assert (optimizer.lr_warmup_iters, optimizer.lr_warmup_ratio, line) == (warmup, None, None)


def test_nothing_to_count_is_the_same_configuration():
    given = config_of(train={"num_train_epochs": None, "train_iters": 3})
    assert in_steps(given, prompts=0, experts=0, expert_rows_per_step=0) == (given, None)
    assert in_steps(given, prompts=0, experts=0, expert_rows_per_step=0)[0] is given


def test_until_then_a_run_is_as_long_as_any():
    assert config_of().train.train_iters == LARGEST_INTEGER


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        (
            {"train": {"train_iters": 5}},
            "train.train_iters=5 and train.num_train_epochs=1 both say how long the run is; set one of them to null",
        ),
        (
            {"optimizer": {"lr_warmup_ratio": 0.1, "lr_warmup_iters": 5}},
            "optimizer.lr_warmup_iters=5 and optimizer.lr_warmup_ratio=0.1 both say how long the learning rate rises; "
            "remove one of them",
        ),
    ],
)
def test_said_twice(groups: dict, sentence: str):
    with pytest.raises(UserError) as caught:
        check_length_of_run(config_of(**groups))
    assert str(caught.value) == sentence


def test_too_many_steps():
    with pytest.raises(UserError, match="are 2500000000 steps; lower it"):
        in_steps(config_of(train={"num_train_epochs": 1e9}), prompts=80, experts=1, expert_rows_per_step=1)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "optimizer.lr"),
        ("num_generations", "rollout.num_generations"),
        ("learning_rate", "optimizer.lr"),
        ("train.learning_rate", "optimizer.lr"),
        ("max_steps", "train.train_iters"),
        ("ppo_mini_batch_size", "train.global_batch_size"),
        ("grpo.lr", "optimizer.lr"),
    ],
)
def test_which_group(key: str, meant: str, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ntrain: {output_dir: o, global_batch_size: 8, train_iters: 1}\n")
    with pytest.raises(UserError) as caught:
        load_config(path, [f"{key}=1"])
    assert str(caught.value) == f"unknown configuration key '{key}'; did you mean '{meant}'?"


def test_every_other_name_leads_to_a_key():
    from chord_megatron.config import known_keys
    from chord_megatron.config_names import OTHER_NAMES

    known, leaves = known_keys(), {key.split(".")[-1] for key in known_keys()}
    assert [key for key in OTHER_NAMES.values() if key not in known] == []
    assert [name for name in OTHER_NAMES if name in leaves] == []
