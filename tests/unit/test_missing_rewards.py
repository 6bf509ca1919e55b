"""Completions that cannot be scored, lengths as rewards, and what is left of a step without rewards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from chord_megatron.algorithm.objective import chord_loss
from chord_megatron.batching.packing import BatchLayout, build_global_batch, pack
from chord_megatron.batching.samples import expert_training_samples, rollout_training_samples
from chord_megatron.config import ChordConfig, Config, GRPOConfig
from chord_megatron.rewards import RewardFunctions, build_reward_function
from chord_megatron.rewards.scoring import score_rollouts
from chord_megatron.system.errors import UserError
from chord_megatron.tracking.step_metrics import loss_metrics, rollout_metrics
from chord_megatron.training.advantages import advantages_of
from chord_megatron.training.objective import build_objective
from chord_megatron.types import ExpertSample, LossTotals, Prompt, RolloutSample, ScoredRollouts, TrainingSample

NAN = math.nan
ROWS = (["p"] * 4, ["a", "b", "c", "d"], ["1"] * 4, [{}] * 4)


@pytest.fixture
def rewards(tmp_path: Path) -> Iterator[Any]:
    """Builds reward functions that return these lists, whatever they are asked."""
    built: list[RewardFunctions] = []

    def build(*returned: str, weights: list[float] | None = None, on_error: Any = "leave_out") -> RewardFunctions:
        for number, values in enumerate(returned):
            (tmp_path / f"f{number}.py").write_text(f"NaN = float('nan')\ndef f(completions): return {values}\n")
        names = [f"{tmp_path}/f{number}.py:f" for number in range(len(returned))]
        built.append(build_reward_function(names, weights, 20, on_error=on_error))
        return built[-1]

    yield build
    for functions in built:
        functions.close()


def totals(functions: RewardFunctions, num_generations: int = 2) -> list[Any]:
    found = functions(*ROWS, num_generations=num_generations).total
    return [None if math.isnan(reward) else reward for reward in found]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (["[1, 2, None, 4]"], [1, 2, None, 4]),
        (["[1, NaN, None, NaN]"], [1, None, None, None]),
        (["[None] * 4"], [None] * 4),
        # The first function does not apply to the second group, nor the second to the first.
        (["[1, 2, None, None]", "[None, None, 3, 4]"], [1, 2, 30, 40]),
        # Within a group it fails: 10 alone would compare with 2 + 10 by what is missing.
        (["[None, 2, 3, 4]", "[1, 1, 1, 1]"], [None, 12, 13, 14]),
        (["[None, 2, None, None]", "[1, 1, NaN, 1]"], [None, 12, None, 10]),
        (["[None] * 4", "[None, 1, None, None]"], [None, 10, None, None]),
    ],
)
def test_which_completions_are_unscorable(rewards: Any, returned: list[str], expected: list[Any]):
    assert totals(rewards(*returned, weights=[1.0, 10.0][: len(returned)])) == expected


def test_a_completion_alone_needs_one_function_that_scores_it(rewards: Any):
    """As in evaluations, which have one completion of each prompt."""
    functions = rewards("[None, 2, 3, None]", "[1, 1, NaN, None]")
    assert totals(functions, num_generations=1) == [1, 3, 3, None]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1, None, 1, 1]", "returned None, not a finite number, at index 1; rewards.on_error=leave_out leaves such "),
        ("[1, 1, NaN, 1]", "returned nan, not a finite number, at index 2; rewards.on_error=leave_out leaves such "),
        ("[1, 1, 1, 'x']", "returned 'x', not a finite number, at index 3$"),
    ],
)
def test_without_the_key_a_missing_reward_ends_the_run(rewards: Any, returned: str, message: str):
    with pytest.raises(UserError, match=message):
        rewards(returned, on_error="stop")(*ROWS)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1, float('inf'), 1, 1]", "returned inf, not a finite number, at index 1"),
        ("[1, 'x', 1, 1]", "returned 'x', not a finite number, at index 1"),
        ("[None, None]", "returned 2 rewards for 4 completions"),
        ("None", "must return a list of numbers, not None"),
    ],
)
def test_other_mistakes_end_it_with_the_key_too(rewards: Any, returned: str, message: str):
    with pytest.raises(UserError, match=message):
        rewards(returned)(*ROWS)


# --- lengths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "reward"),
    [(0, 0.0), (1, 0.0), (6, 0.0), (7, -0.25), (8, -0.5), (9, -0.75), (10, -1.0), (11, -1.0), (500, -1.0)],
)
def test_soft_overlong_by_hand(length: int, reward: float):
    functions = build_reward_function(["soft_overlong"], [2.0], 1, soft_max_length=10, soft_cache_length=4)
    found = functions(["p"], ["x" * 99], ["1"], [{}], completion_ids=[[7] * length])
    assert found.by_function == {"soft_overlong": [reward]} and found.total == [2 * reward]


def test_soft_overlong_of_whole_length():
    functions = build_reward_function(["soft_overlong"], None, 1, soft_max_length=4, soft_cache_length=4)
    ids = [[7] * length for length in range(5)]
    assert functions(["p"] * 5, [""] * 5, ["1"] * 5, [{}] * 5, completion_ids=ids).total == [0, -0.25, -0.5, -0.75, -1]


@pytest.mark.parametrize("name", ["completion_ids", "response_token_ids"])
def test_a_function_gets_the_tokens_of_completions_by_the_names_of_trl_and_ms_swift(name: str, tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        f"def f(completions, {name}, **kw): return [sum(ids) + len(kw) for ids in {name}]"
    )
    functions = build_reward_function([f"{tmp_path}/mine.py:f"], None, 20, columns=[])
    assert functions(["p"] * 2, ["a", "b"], ["1"] * 2, [{}] * 2, completion_ids=[[1, 2], []]).total == [5.0, 2.0]
    functions.close()


def test_a_column_of_that_name_wins(tmp_path: Path):
    (tmp_path / "mine.py").write_text("def f(completion_ids): return [float(value) for value in completion_ids]")
    functions = build_reward_function([f"{tmp_path}/mine.py:f"], None, 20, columns=["completion_ids"])
    columns = [{"completion_ids": 3}, {"completion_ids": 4}]
    assert functions(["p"] * 2, ["a", "b"], ["1"] * 2, columns, completion_ids=[[1], [1]]).total == [3.0, 4.0]
    functions.close()


# --- a step ---------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, tokens))


def rollout(index: int, text: str, finish_reason: Any = "length") -> RolloutSample:
    tokens = torch.tensor([0, *map(ord, text)], dtype=torch.int32)
    mask = torch.arange(len(tokens)) > 0
    return RolloutSample(index // 2, index, tokens, mask, -0.5 * mask, 0, finish_reason)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config(**groups: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "model": {"path": "m"},
        "data": {"dataset": "d"},
        "train": {"output_dir": "o", "global_batch_size": 4, "train_iters": 4},
        "rollout": {"num_generations": 2},
    }
    return Config.model_validate({name: {**base.get(name, {}), **groups.get(name, {})} for name in {*base, *groups}})


def scored(rewards: list[float], finish_reasons: str = "llll") -> ScoredRollouts:
    """Completions of one to four tokens; l: cut at the longest, s: stopped."""
    reasons = {"l": "length", "s": "stop"}
    rollouts = [rollout(i, "abcd"[: i + 1], reasons[reason]) for i, reason in enumerate(finish_reasons)]
    prompts = (Prompt(0, "p", (0,), ""),) * len(rewards)
    return ScoredRollouts(prompts, tuple(rollouts), tuple(rewards), {"accuracy": tuple(rewards)}, (0,) * len(rewards))


def samples_of(batch: ScoredRollouts, **grpo: Any) -> list[TrainingSample]:
    settings = config(grpo=grpo)
    return rollout_training_samples(
        batch.rollouts,
        advantages_of(batch, settings),
        temperature=1.0,
        overlong_filter=settings.grpo.overlong_filter,
        rewards=batch.rewards,
    )


def test_scores_and_metrics_of_a_batch_with_missing_rewards(one_rank: None, rewards: Any):
    functions = rewards("[1, None, 3, 5]")
    prompts = [Prompt(0, "p", (0,), ""), Prompt(1, "q", (0,), "")]
    batch = score_rollouts(prompts, [rollout(i, "ab") for i in range(4)], Letters(), functions)
    found = rollout_metrics(batch)
    (name,) = batch.rewards_by_function
    assert found["reward_mean"] == found[f"reward/{name}"] == 3.0
    assert found["reward_std"] == pytest.approx(math.sqrt(8 / 3))
    assert (found["unscorable_completions"], found["reward_errors"]) == (1, 0)
    assert rollout_metrics(None)["unscorable_completions"] is None
    nothing = rollout_metrics(scored([NAN] * 4))
    assert [nothing[key] for key in ("reward_mean", "reward_std", "reward/accuracy")] == [None] * 3
    assert nothing["unscorable_completions"] == 4


def test_an_unscorable_completion_is_out_of_statistics_and_loss():
    first, second, third, fourth = samples_of(scored([1.0, NAN, 3.0, 5.0]))
    assert [sample.advantage for sample in (first, second)] == [0.0, 0.0]
    assert third.advantage == -fourth.advantage < 0
    assert not second.loss_mask.any()
    assert [int(sample.loss_mask.sum()) for sample in (first, third, fourth)] == [1, 3, 4]
    batch = build_global_batch([first, second, third, fourth], BatchLayout(), micro_batch_size=4)
    assert batch.num_rollout_tokens == 8


def test_the_overlong_filter_keeps_rewards_in_their_group():
    """What is cut off is not learnt, but the others are compared with it; an unscorable one is neither."""
    first, second, third, fourth = samples_of(scored([0.0, 1.0, NAN, 4.0], "lsss"), overlong_filter=True)
    assert not first.loss_mask.any() and second.loss_mask.any()
    assert second.advantage == pytest.approx(0.5 / (math.sqrt(0.5) + 1e-6))
    assert not third.loss_mask.any() and fourth.advantage == 0.0
    opo = samples_of(scored([0.0, 3.0, 1.0, 1.0], "lsss"), overlong_filter=True, advantage_estimator="opo")
    assert [sample.advantage for sample in opo] == [-2.0, 1.0, 0.0, 0.0]  # (0 x 1 + 3 x 2) / 3


ALL_OUT = {
    "nothing is scored": (scored([NAN] * 4), {}),
    "everything is filtered": (scored([0.0, 1.0, 2.0, 4.0]), {"overlong_filter": True}),
    "no group differs": (scored([1.0, 1.0, 2.0, 2.0]), {}),
}


@pytest.mark.parametrize("case", ALL_OUT)
@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus", "opo", "pass_at_k"])
def test_experts_train_where_rollouts_teach_nothing(case: str, estimator: str):
    batch, grpo = ALL_OUT[case]
    experts = expert_training_samples([ExpertSample(0, (1, 2, 3), 1)])
    samples = [*samples_of(batch, **grpo, advantage_estimator=estimator), *experts]
    step = build_global_batch(samples, BatchLayout(), micro_batch_size=8)
    (micro_batch,) = step.micro_batches
    log_probs = torch.full((len(micro_batch.labels),), -0.5, requires_grad=True)
    objective = build_objective(GRPOConfig(), ChordConfig())
    result = chord_loss(log_probs, torch.ones_like(log_probs), micro_batch, objective=objective, mu=0.25)
    result.loss.backward()
    # Two tokens of log-prob -1/2: a mean of 1/2, and a gradient of -mu / 2 on each.
    assert result.loss.item() == pytest.approx(0.25 * 0.5)
    assert log_probs.grad.tolist() == pytest.approx((-0.125 * micro_batch.expert_mask).tolist())
    totals = LossTotals({name: value.item() for name, value in result.sums.items()}, {"log_prob_diff": 0.0}, {})
    found = loss_metrics(totals, step, objective, 0.25)
    assert all(value is None or math.isfinite(value) for value in found.values())


def test_completions_of_no_tokens_have_an_advantage_and_no_loss():
    rollouts = [rollout(0, ""), rollout(1, "")]
    batch = ScoredRollouts((Prompt(0, "p", (0,), ""),) * 2, tuple(rollouts), (0.0, 1.0), {}, (0, 0))
    for estimator in ("grpo", "opo", "pass_at_k"):
        samples = samples_of(batch, advantage_estimator=estimator)
        assert all(math.isfinite(sample.advantage) for sample in samples)
        step = build_global_batch(samples, BatchLayout(), micro_batch_size=2)
        assert step.num_rollout_tokens == 0 and not step.micro_batches[0].rollout_weights.any()


# --- numbers of single tokens ---------------------------------------------------------------------------------------


def test_numbers_of_single_tokens_lie_where_their_tokens_are_predicted():
    rollout = TrainingSample(
        tokens=torch.tensor([1, 2, 3, 4]),
        loss_mask=torch.tensor([False, False, True, True]),
        is_expert=False,
        temperature=1.0,
        advantage=torch.tensor([9.0, 9.0, 0.5, -2.0]),
        rollout_log_probs=torch.zeros(4),
    )
    expert = TrainingSample(
        tokens=torch.tensor([5, 6, 7, 8]),
        loss_mask=torch.tensor([False, True, False, True]),
        is_expert=True,
        temperature=1.0,
        token_weights=torch.tensor([0.0, 3.0, 0.0, 0.5]),
    )
    batch = pack([rollout, expert], [0, 1], [0.5, 0.25], 1)
    assert batch.advantages.tolist() == [0.0, 0.5, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert batch.rollout_weights.tolist() == [0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert batch.expert_weights.tolist() == [0.0, 0.0, 0.0, 0.0, 0.75, 0.0, 0.125, 0.0]
