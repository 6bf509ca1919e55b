"""Old log-probs: which completions a forward pass of their own is for, what is kept, and those of the sampler.

And which pass over a completion says what experts its updates replay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from chord_megatron.algorithm.objective import Objective, chord_loss
from chord_megatron.algorithm.policy_losses import clipped_policy_loss
from chord_megatron.batching.packing import BatchLayout, build_global_batch
from chord_megatron.config import Config
from chord_megatron.planning.objectives import check_objective
from chord_megatron.planning.plan import Plan
from chord_megatron.system.errors import UserError
from chord_megatron.tracking.timers import PhaseTimer
from chord_megatron.training.rollout_stream import RolloutStream, StepRollouts, _recorded
from chord_megatron.types import (
    GlobalBatch,
    Prompt,
    RolloutSample,
    SamplingParams,
    ScoredRollouts,
    TrainingSample,
)

LOSS = partial(clipped_policy_loss, epsilon=0.2, epsilon_high=0.2)
SIZE, GENERATIONS = 4, 2  # completions of a step and of a prompt
REWARDS = (0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0)  # the third of four groups has no variance
SAMPLER, TRAINER, REFERENCE = -1.0, -2.0, -4.0  # what each says of every token
PASS = 100  # the expert of a pass that is no step's own, whose is its number


class Engine:
    """Notes each pass: whose it is, the samples by their lengths, which differ, and the rows that are not run."""

    batch_layout = BatchLayout()
    policy_version = 0

    def __init__(self) -> None:
        self.passes: list[tuple[str, tuple[int, ...], int]] = []

    def compute_log_probs(self, batch: GlobalBatch, *, reference: bool = False) -> list[Tensor]:
        self.passes.append(("reference" if reference else "trainer", batch.lengths, batch.num_idle_rows))
        value = REFERENCE if reference else TRAINER
        return [torch.where(torch.arange(length) >= 2, value, 0.0) for length in batch.lengths]

    def compute_log_probs_and_entropies(self, batch: GlobalBatch) -> tuple[list[Tensor], list[Tensor]]:
        log_probs = self.compute_log_probs(batch)
        return log_probs, [torch.arange(len(row)).float() for row in log_probs]

    @contextmanager
    def recorded_routing(self, batch: GlobalBatch) -> Iterator[list[Tensor]]:
        rows: list[Tensor] = []
        yield rows
        rows.extend(torch.full((length, 1, 1), PASS, dtype=torch.int16) for length in batch.lengths)


def rollout(place: int) -> RolloutSample:
    """Two tokens of a prompt, and 1 + place of a completion."""
    mask = torch.arange(3 + place) >= 2
    log_probs = torch.where(mask, SAMPLER, 0.0)
    return RolloutSample(place // GENERATIONS, place, torch.arange(3 + place), mask, log_probs, 0, "stop")


def stream(grpo: dict[str, Any], router_replay: str | None = None) -> tuple[RolloutStream, Engine]:
    """Of generation batches that are all alike."""
    config = Config.model_validate(
        {
            "model": {"path": "model"},
            "rollout": {"num_generations": GENERATIONS, "router_replay": router_replay},
            "grpo": grpo,
            "chord": {"chord_mu_peak": 0.5, "chord_mu_valley": 0.5},
            "train": {"output_dir": "out", "global_batch_size": SIZE, "train_iters": 4, "micro_batch_size": 2},
        }
    )
    steps = config.grpo.steps_per_generation * config.grpo.num_iterations
    engine, count = Engine(), SIZE * config.grpo.steps_per_generation
    rollouts, rewards = tuple(rollout(place) for place in range(count)), REWARDS[:count]

    def draw(prompts: Sequence[Prompt], *args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(result=lambda: rollouts)

    def score(prompts: Sequence[Prompt], drawn: Sequence[RolloutSample]) -> ScoredRollouts:
        return ScoredRollouts((Prompt(0, "", (0, 1), ""),) * count, rollouts, rewards, {}, (0,) * count)

    built = RolloutStream(
        config,
        Plan(1, 1, SIZE // GENERATIONS, SIZE, 0, 2, 64, steps),
        Objective(LOSS, beta=config.grpo.beta, kl_in_reward=config.grpo.kl_in_reward),
        [Prompt(0, "", (0, 1), "")],
        SamplingParams(),
        sampler=SimpleNamespace(engine=engine, draw=draw, timer=PhaseTimer()),  # type: ignore[arg-type]
        scorer=SimpleNamespace(score=score),  # type: ignore[arg-type]
        seed=0,
    )
    return built, engine


def olds(step: StepRollouts) -> list[float | None]:
    """The old log-prob of each sample's tokens."""
    return [None if s.old_log_probs is None else s.old_log_probs[-1].item() for s in step.samples]


def take(built: RolloutStream, mus: Sequence[float]) -> list[StepRollouts]:
    """A step for each mu; as the trainer does, what a step lacks is remembered: here the step's number."""
    steps = []
    for number, mu in enumerate(mus):
        steps.append(built.next(number, mu))
        log_probs, routing = None, None
        if steps[-1].lack_old_log_probs:
            of_experts = [torch.zeros(5)]
            log_probs = [torch.full((len(s.tokens),), float(number)) for s in steps[-1].samples] + of_experts
        if steps[-1].lack_routing:
            of_experts = [torch.zeros(5, 1, 1, dtype=torch.int16)]
            routing = [torch.full((len(s.tokens), 1, 1), number).short() for s in steps[-1].samples] + of_experts
        built.remember(number, log_probs, routing)
    return steps


ALL, LATER = (3, 4, 5, 6, 7, 8, 9, 10), (7, 8, 9, 10)


def test_on_policy_steps_need_none():
    built, engine = stream({})
    (step,) = take(built, [0.5])
    assert olds(step) == [None] * SIZE and not step.lack_old_log_probs and engine.passes == []


def test_passes_over_one_step_keep_what_the_first_one_finds():
    built, engine = stream({"num_iterations": 3})
    steps = take(built, [0.5] * 3)
    assert [olds(step) for step in steps] == [[None] * SIZE, [0.0] * SIZE, [0.0] * SIZE]
    assert [step.lack_old_log_probs for step in steps] == [True, False, False]
    assert engine.passes == []


def test_later_steps_have_a_pass_without_idle_rows():
    built, engine = stream({"steps_per_generation": 2})
    steps = take(built, [0.5] * 2)
    assert [olds(step) for step in steps] == [[None] * SIZE, [TRAINER] * SIZE]
    assert not any(step.lack_old_log_probs for step in steps)
    assert engine.passes == [("trainer", LATER, 2)]


def test_two_passes_over_two_steps():
    built, engine = stream({"steps_per_generation": 2, "num_iterations": 2})
    steps = take(built, [0.5] * 4)
    assert [olds(step) for step in steps] == [[None] * SIZE, [TRAINER] * SIZE, [0.0] * SIZE, [TRAINER] * SIZE]
    assert [step.lack_old_log_probs for step in steps] == [True, False, False, False]
    assert engine.passes == [("trainer", LATER, 2)]


def test_a_first_step_that_learns_no_rollouts_finds_nothing_for_later_ones():
    built, engine = stream({"steps_per_generation": 2, "num_iterations": 2})
    steps = take(built, [1.0, 0.5, 0.5, 0.5])
    assert [olds(step) for step in steps] == [[], *[[TRAINER] * SIZE] * 3]
    assert engine.passes == [("trainer", ALL, 2)]


def test_a_first_step_that_learns_no_rollouts_and_has_no_later_pass_needs_nothing():
    built, engine = stream({"steps_per_generation": 2})
    assert olds(take(built, [1.0, 0.5])[1]) == [TRAINER] * SIZE
    assert engine.passes == [("trainer", LATER, 2)]


def test_a_penalty_in_the_loss_needs_idle_rows():
    built, engine = stream({"steps_per_generation": 2, "beta": 0.1})
    take(built, [0.5] * 2)
    assert engine.passes == [("reference", ALL, 0), ("trainer", LATER, 0)]


def test_what_advantages_need_is_of_all_and_not_computed_again():
    for settings in ({"beta": 0.1, "kl_in_reward": True}, {"top_entropy_quantile": 0.5}):
        built, engine = stream({"steps_per_generation": 2, "num_iterations": 2, **settings})
        steps = take(built, [0.5] * 4)
        assert [olds(step) for step in steps] == [[TRAINER] * SIZE] * 4
        assert [p for p in engine.passes if p[0] == "trainer"] == [("trainer", ALL, 0)]


def experts(step: StepRollouts) -> list[int | None]:
    """The expert of each sample's tokens."""
    for sample in step.samples:
        assert sample.routing is None or sample.routing.shape == (len(sample.tokens), 1, 1)
    return [None if s.routing is None else int(s.routing[-1]) for s in step.samples]


ALL_LIVE, OF_THE_PASS = [None] * SIZE, [PASS] * SIZE


@pytest.mark.parametrize(
    ("grpo", "replayed"),
    [
        ({"num_iterations": 3}, [ALL_LIVE, [0] * SIZE, [0] * SIZE]),
        ({"steps_per_generation": 2}, [ALL_LIVE, OF_THE_PASS]),
        (
            {"steps_per_generation": 2, "num_iterations": 2},
            [ALL_LIVE, OF_THE_PASS, [0] * SIZE, OF_THE_PASS],
        ),
        # Without a pass before them the steps of the first iteration are each the first over their completions.
        (
            {"steps_per_generation": 2, "num_iterations": 2, "old_log_probs": "sampler"},
            [ALL_LIVE, ALL_LIVE, [0] * SIZE, [1] * SIZE],
        ),
        ({"steps_per_generation": 2, "top_entropy_quantile": 0.5}, [OF_THE_PASS] * 2),
        ({"num_iterations": 2, "beta": 0.1, "kl_in_reward": True}, [OF_THE_PASS] * 2),
        ({"num_iterations": 2, "beta": 0.1}, [ALL_LIVE, [0] * SIZE]),  # the reference model's choice is its own
    ],
)
def test_updates_replay_the_first_pass_over_their_completions(grpo: dict[str, Any], replayed: list[list[int | None]]):
    built, _ = stream(grpo, "trainer")
    steps = take(built, [0.5] * len(replayed))
    assert [experts(step) for step in steps] == replayed
    again = grpo.get("num_iterations", 1) > 1
    assert [step.lack_routing for step in steps] == [again and of_step == ALL_LIVE for of_step in replayed]


def test_nothing_is_replayed_unasked():
    for router_replay in (None, "sampler"):
        built, _ = stream({"steps_per_generation": 2, "num_iterations": 2}, router_replay)
        steps = take(built, [0.5] * 4)
        assert [experts(step) for step in steps] == [ALL_LIVE] * 4
        assert not any(step.lack_routing for step in steps)


def test_those_of_the_sampler_need_no_pass():
    built, engine = stream({"steps_per_generation": 2, "num_iterations": 2, "old_log_probs": "sampler"})
    steps = take(built, [0.5] * 4)
    assert [olds(step) for step in steps] == [[None] * SIZE] * 4
    assert not any(step.lack_old_log_probs for step in steps) and engine.passes == []


@pytest.mark.parametrize(("old_log_probs", "log_prob"), [("trainer", TRAINER), ("sampler", SAMPLER)])
def test_the_penalty_in_the_reward_is_of_old_log_probs(old_log_probs: str, log_prob: float):
    """Rewards 0 and 1 of completions of 1 and 2 tokens, less beta times (log pi_old - log pi_ref) of each token."""
    grpo = {"beta": 0.1, "kl_in_reward": True, "scale_rewards": "none", "old_log_probs": old_log_probs}
    built, engine = stream(grpo)
    (step,) = take(built, [0.5])
    first, second = (reward - 0.1 * tokens * (log_prob - REFERENCE) for reward, tokens in ((0, 1), (1, 2)))
    assert [s.advantage for s in step.samples[:2]] == pytest.approx([(first - second) / 2, (second - first) / 2])
    assert [name for name, *_ in engine.passes] == ["trainer"] * (old_log_probs == "trainer") + ["reference"]


def test_the_penalty_leaves_out_tokens_that_the_sampler_says_nothing_of():
    drawn = rollout(1)
    drawn.rollout_log_probs[2:] = torch.tensor([math.nan, -math.inf])
    assert _recorded(drawn, torch.tensor([0.0, 0.0, -3.0, -5.0])).tolist() == [0.0, 0.0, -3.0, -5.0]


def test_the_samplers_ratio_by_hand():
    """exp(log pi - log pi_sampler): 1.1; 2, which is clipped; 1 where nothing was recorded; e^20 at most."""
    recorded = [0.0, -1.0 - math.log(1.1), -1.0 - math.log(2.0), math.nan, -1e30]
    sample = TrainingSample(
        tokens=torch.arange(5),
        loss_mask=torch.arange(5) > 0,
        is_expert=False,
        temperature=1.0,
        advantage=1.0,
        rollout_log_probs=torch.tensor(recorded),
    )
    (batch,) = build_global_batch([sample], BatchLayout(), micro_batch_size=1).micro_batches
    log_probs = torch.tensor([-1.0, -1.0, -1.0, -1.0, 0.0], requires_grad=True)  # of the next token
    objective = Objective(LOSS, old_is_sampler=True)
    loss, sums, _, _ = chord_loss(log_probs, torch.ones(5), batch, objective=objective, mu=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.1 + 1.2 + 1.0 + 1.2) / 4, rel=1e-6)
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([-1.1 / 4, 0.0, -1 / 4, 0.0, 0.0], rel=1e-6)
    assert sums["clipped_high"].item() == 2 and sums["non_finite_rollout_log_probs"].item() == 1

    on_policy, _, _, _ = chord_loss(log_probs, torch.ones(5), batch, objective=Objective(LOSS), mu=0.0)
    assert on_policy.item() == -1.0


def test_a_ratio_against_the_sampler_has_nothing_to_correct():
    grpo = {"old_log_probs": "sampler", "rollout_importance_sampling_mode": "token_mask"}
    config = {"model": {"path": "m"}, "grpo": grpo}
    config["train"] = {"output_dir": "out", "global_batch_size": 8, "train_iters": 1}
    with pytest.raises(UserError) as error:
        check_objective(Config.model_validate(config).grpo)
    assert str(error.value) == (
        "grpo.old_log_probs=sampler takes the ratio against the sampler itself, which leaves "
        "grpo.rollout_importance_sampling_mode=token_mask nothing to correct; remove one of them"
    )
