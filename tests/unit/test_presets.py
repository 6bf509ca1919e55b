"""What chord.semantics changes: means, the step that mu counts from, what is drawn though it weighs nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from chord_megatron.algorithm.aggregation import Mean
from chord_megatron.algorithm.policy_losses import PolicyTokens
from chord_megatron.algorithm.presets import Preset
from chord_megatron.algorithm.sequences import Sequences
from chord_megatron.config import Config
from chord_megatron.planning.plan import Plan
from chord_megatron.planning.presets import check_preset, cost_of_preset, keeps_filtered
from chord_megatron.planning.schedule import mu_at, mu_range, needs_rollouts
from chord_megatron.planning.streams import check_streams
from chord_megatron.system.errors import UserError
from chord_megatron.training.expert_stream import ExpertStream
from chord_megatron.training.objective import build_means, build_objective
from chord_megatron.types import ExpertSample

EXPERTS = [ExpertSample(i, (1, 2, 3 + i), 1) for i in range(4)]


def config_of(semantics: Preset, chord: dict[str, Any] | None = None, **grpo: Any) -> Config:
    """16 completions of at most 20 tokens a step, 4 in a micro-batch."""
    return Config.model_validate(
        {
            "model": {"path": "model"},
            "rollout": {"max_completion_length": 20, "temperature": 0.5},
            "grpo": grpo,
            "chord": {"semantics": semantics, **(chord or {})},
            "train": {"output_dir": "out", "global_batch_size": 16, "micro_batch_size": 4, "train_iters": 10},
        }
    )


def plan_of(data_parallel_size: int) -> Plan:
    return Plan(data_parallel_size, data_parallel_size, 2, 16, 8, 4, 64, 1)


@pytest.mark.parametrize(
    ("semantics", "loss_type", "rollout", "expert"),
    [
        ("paper", "dapo", Mean("token_mean", 20), Mean()),
        ("paper", "grpo", Mean("sequence_mean", 20), Mean()),
        ("ms-swift", "grpo", Mean("sequence_mean", 20, rows=4), Mean(rows=2)),
        ("ms-swift", "dapo", Mean("token_mean", 20, scale=2 / 4), Mean(rows=2)),  # 4 micro-batches on 2 ranks
        ("trinity", "dapo", Mean("token_mean", 20, rows=4, by_rows=True), Mean(rows=4, by_rows=True)),
    ],
)
def test_the_means_of_a_preset(semantics: Preset, loss_type: str, rollout: Mean, expert: Mean):
    assert build_means(config_of(semantics, loss_type=loss_type), plan_of(2)) == (rollout, expert)


def test_mu_counts_from_the_first_step_of_the_preset():
    chord = {"chord_mu_peak": 0.8, "chord_mu_warmup_steps": 4, "chord_mu_decay_steps": 0, "chord_mu_valley": 0.0}
    assert [mu_at(config_of("paper", chord), step) for step in range(5)] == pytest.approx([0, 0.2, 0.4, 0.6, 0])
    assert [mu_at(config_of("trinity", chord), step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0])
    assert mu_range(config_of("trinity", chord)) == pytest.approx((0.0, 0.6))


@pytest.mark.parametrize(("semantics", "drawn"), [("paper", 0), ("ms-swift", 0), ("trinity", 2)])
def test_what_is_drawn_at_mu_0(semantics: Preset, drawn: int):
    stream = ExpertStream(config_of(semantics), EXPERTS, 2, seed=0)
    before = stream.state_dict()
    assert len(stream.next(0.0)) == drawn
    assert (stream.state_dict() == before) == (drawn == 0)
    assert ExpertStream(config_of(semantics), [], 0, seed=0).next(0.0) == []


@pytest.mark.parametrize(("semantics", "temperature"), [("paper", 1.0), ("ms-swift", 1.0), ("trinity", 0.5)])
def test_the_temperature_of_experts(semantics: Preset, temperature: float):
    samples = ExpertStream(config_of(semantics), EXPERTS, 2, seed=0).next(0.5)
    assert [sample.temperature for sample in samples] == [temperature, temperature]


@pytest.mark.parametrize(("semantics", "needed"), [("paper", False), ("ms-swift", True), ("trinity", True)])
def test_whether_rollouts_are_drawn_at_mu_1(semantics: Preset, needed: bool):
    assert needs_rollouts(config_of(semantics, {"chord_mu_peak": 1.0, "chord_mu_valley": 1.0})) == needed


def test_prompts_are_asked_for_where_a_preset_draws_rollouts_at_mu_1():
    experts = {"chord_sft_dataset": "experts.jsonl", "chord_sft_global_batch_size": 8}
    supervised = {**experts, "chord_mu_peak": 1.0, "chord_mu_valley": 1.0}
    check_streams(config_of("paper", supervised))
    with pytest.raises(UserError, match=r"^data.dataset is required under chord.semantics=trinity, which draws rollou"):
        check_streams(config_of("trinity", supervised))


def test_what_a_preset_needs():
    with pytest.raises(UserError, match=r"of the 4 micro-batches of a step, but a step has 6; set chord\.chord"):
        check_preset(config_of("ms-swift"), expert_rows_per_step=6)
    check_preset(config_of("ms-swift"), expert_rows_per_step=8)
    check_preset(config_of("trinity"), expert_rows_per_step=6)
    with pytest.raises(UserError, match=r"not built; set grpo\.steps_per_generation=1"):
        check_preset(config_of("ms-swift", loss_type="dapo", steps_per_generation=2), expert_rows_per_step=8)


def test_a_clip_range_beyond_the_dual_clip_of_a_preset_is_refused():
    """Trinity takes the smaller bound, and nothing says which one is meant."""
    with pytest.raises(
        UserError, match=r"^chord.semantics=trinity clips ratios at 3 where grpo.delta is null, but 1 \+ "
    ):
        check_preset(config_of("trinity", epsilon_high=2.0), expert_rows_per_step=8)
    check_preset(config_of("trinity", epsilon_high=1.9), expert_rows_per_step=8)
    check_preset(config_of("trinity", epsilon_high=2.0, delta=3.5), expert_rows_per_step=8)
    check_preset(config_of("trinity", loss_type="cispo", epsilon_high=5.0), expert_rows_per_step=8)


def test_what_a_preset_costs():
    assert cost_of_preset(config_of("paper")) == ""
    assert "change with train.micro_batch_size" in cost_of_preset(config_of("trinity"))
    assert "expert rows are read at mu = 0" in cost_of_preset(config_of("trinity"))
    assert "divided by the accumulation steps" in cost_of_preset(config_of("ms-swift", loss_type="dapo"))


@pytest.mark.parametrize(
    ("semantics", "grpo", "kept"),
    [
        ("paper", {}, False),
        ("ms-swift", {"loss_type": "grpo"}, True),
        ("ms-swift", {"loss_type": "bnpo"}, False),
        ("ms-swift", {"loss_type": "grpo", "filtered_count": "drop"}, False),
        ("trinity", {"filtered_count": "keep"}, True),
    ],
)
def test_whether_filtered_completions_count(semantics: Preset, grpo: dict[str, Any], kept: bool):
    assert keeps_filtered(config_of(semantics, **grpo)) == kept


def test_bounds_of_the_presets():
    """A token of advantage -1 whose ratio is e^1.5, held at 3 by the dual clip; a KL penalty of e^5 - 6, held at 10."""
    log_probs, advantages = torch.tensor([0.0]), torch.tensor([-1.0])
    mask, sequences = torch.tensor([True]), Sequences(torch.tensor([0, 1]))
    losses = {}
    for semantics in ("paper", "trinity"):
        config = config_of(semantics)
        objective = build_objective(config.grpo, config.chord)
        log_ratios = torch.tensor([1.5])
        tokens = PolicyTokens(log_probs, log_ratios, advantages, mask, sequences)
        losses[semantics] = objective.policy_loss(tokens).loss.item()
    assert losses == pytest.approx({"paper": math.exp(1.5), "trinity": 3.0})
    config = config_of("ms-swift", beta=0.1)
    penalty = build_objective(config.grpo, config.chord).kl_estimator(torch.tensor([-5.0]), torch.tensor([0.0]))
    assert penalty.item() == 10.0
