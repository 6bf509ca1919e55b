"""Bugs that trainers of this kind have had, put in one at a time: each must show in the loss or the gradient of a step.

The step is small, in float64, and the same for every micro-batch size, number of data-parallel ranks and order. Not
here, because nothing of one process can have it: plain all_reduce under autograd, which the shards of
`test_linear_log_probs.py` would show; and a second forward pass inside the loss, which gets log-probs alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from chord_megatron import ops
from chord_megatron.algorithm import advantages, objective
from chord_megatron.algorithm.aggregation import Mean
from chord_megatron.algorithm.objective import Objective
from chord_megatron.algorithm.policy_losses import clipped_policy_loss, sequence_log_ratios
from chord_megatron.algorithm.sequences import Sequences
from chord_megatron.batching import packing
from chord_megatron.batching.packing import BatchLayout
from chord_megatron.config import Config
from chord_megatron.ops import linear_log_probs_torch
from chord_megatron.training.expert_stream import ExpertStream
from chord_megatron.types import ExpertSample, GlobalBatch, TrainingSample

MU, TEMPERATURE, EPSILON = 0.3, 0.7, 0.05
VOCABULARY, PADDED, WIDTH = 13, 16, 5
OBJECTIVE = Objective(
    partial(clipped_policy_loss, epsilon=EPSILON, epsilon_high=EPSILON), ratio_level=sequence_log_ratios
)
CLOSE = {"rtol": 1e-6, "atol": 1e-9}  # the weights of tokens are float32


def make_model() -> tuple[Tensor, Tensor]:
    """An embedding, and an output layer whose logits all lie far below zero; its last rows are padding."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.rand(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    output = torch.randn(PADDED, WIDTH, generator=generator, dtype=torch.float64)
    output[:VOCABULARY] -= 1000
    return embedding.requires_grad_(), output.requires_grad_()


def make_samples() -> list[TrainingSample]:
    """Two groups of completions, one of them without two different rewards, and three expert rows."""
    generator = torch.Generator().manual_seed(1)
    rewards = torch.tensor([0.1, 0.7, 0.2, 0.1, 0.1, 0.1], dtype=torch.float64)
    of_rollouts = advantages.group_advantages(rewards, 3).tolist()
    samples = []
    for place, (prompt, answer) in enumerate([(2, 3), (2, 1), (2, 6), (1, 2), (1, 4), (1, 1), (3, 5), (1, 2), (2, 1)]):
        length, is_expert = prompt + answer, place >= len(of_rollouts)
        samples.append(
            TrainingSample(
                tokens=torch.randint(VOCABULARY, (length,), generator=generator),
                loss_mask=torch.arange(length) >= prompt,
                is_expert=is_expert,
                temperature=1.0 if is_expert else TEMPERATURE,
                advantage=0.0 if is_expert else of_rollouts[place],
                old_log_probs=None if is_expert else -3 * torch.rand(length, generator=generator),
                rollout_log_probs=None if is_expert else torch.zeros(length),
            )
        )
    return samples


def the_definition(samples: list[TrainingSample], embedding: Tensor, output: Tensor) -> Tensor:
    """(1 - mu) L_GRPO + mu L_SFT, sequence by sequence."""
    policy, expert, num_policy, num_expert = 0.0, 0.0, 0, 0
    for sample in samples:
        logits = embedding[sample.tokens[:-1]] @ output[:VOCABULARY].T / sample.temperature
        log_probs = torch.log_softmax(logits, -1).gather(1, sample.tokens[1:, None]).squeeze(1)[sample.loss_mask[1:]]
        if sample.is_expert:
            expert, num_expert = expert - log_probs.sum(), num_expert + len(log_probs)
            continue
        ratio = torch.exp((log_probs - sample.old_log_probs.double()[1:][sample.loss_mask[1:]]).mean())
        surrogate = torch.minimum(ratio * sample.advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * sample.advantage)
        policy, num_policy = policy - len(log_probs) * surrogate, num_policy + len(log_probs)
    return (1 - MU) * policy / num_policy + MU * expert / num_expert


def the_step(batches: list[GlobalBatch], embedding: Tensor, output: Tensor) -> Tensor:
    """The same by the package: the head, then the loss, summed over micro-batches and ranks."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in (micro_batch for one_rank in batches for micro_batch in one_rank.micro_batches):
        log_probs, entropy = ops.linear_log_probs(
            embedding[batch.input_ids],
            output,
            batch.labels,
            vocab_size=VOCABULARY,
            temperature=batch.temperatures.double(),
        )
        total = total + objective.chord_loss(log_probs, entropy, batch, objective=OBJECTIVE, mu=MU).loss
    return total


def check_step() -> None:
    """Loss and gradient are those of the definition, however the step is cut."""
    samples, model = make_samples(), make_model()
    assert [sample.advantage for sample in samples[3:6]] == [0.0, 0.0, 0.0]
    wanted = the_definition(samples, *model)
    gradients = torch.autograd.grad(wanted, model)
    for micro_batch_size, dp_size, seed in itertools.product((1, 2, 4), (1, 2, 3), (None, 3)):
        batches = [
            packing.build_global_batch(
                samples, BatchLayout(rank, dp_size), micro_batch_size=micro_batch_size, shuffle_seed=seed
            )
            for rank in range(dp_size)
        ]
        loss = the_step(batches, *model)
        torch.testing.assert_close(loss, wanted, **CLOSE)
        for actual, expected in zip(torch.autograd.grad(loss, model), gradients):
            torch.testing.assert_close(actual, expected, **CLOSE)


def check_resuming() -> None:
    """A resumed expert stream goes on where it stood."""
    config = Config.model_validate(
        {"model": {"path": "m"}, "train": {"output_dir": "o", "global_batch_size": 8, "train_iters": 1}}
    )
    experts = [ExpertSample(i, (1, 2, i), 1) for i in range(9)]
    whole, first, resumed = (ExpertStream(config, experts, 2, seed=0) for _ in range(3))
    for stream in (whole, first):
        stream.next(0.5), stream.next(0.5)
    resumed.load_state_dict(first.state_dict())
    assert [s.row for s in resumed.next(0.5)] == [s.row for s in whole.next(0.5)]


def scaled(stream: str, factor: Callable[[GlobalBatch], float]) -> Callable[[pytest.MonkeyPatch], None]:
    """A stream's weights times a number that depends on how the step was cut."""
    build = packing.build_global_batch

    def build_scaled(*args: Any, **options: Any) -> GlobalBatch:
        batch = build(*args, **options)
        changed = [
            dataclasses.replace(each, **{stream: getattr(each, stream) * factor(batch)}) for each in batch.micro_batches
        ]
        return dataclasses.replace(batch, micro_batches=tuple(changed))

    return lambda patch: patch.setattr(packing, "build_global_batch", build_scaled)


def micro_batch_means(patch: pytest.MonkeyPatch) -> None:
    build = packing.build_global_batch

    def build_from_means(samples: Any, layout: BatchLayout, *, micro_batch_size: int, **options: Any) -> GlobalBatch:
        mean = Mean(rows=micro_batch_size)
        return build(samples, layout, micro_batch_size=micro_batch_size, rollout_mean=mean, **options)

    patch.setattr(packing, "build_global_batch", build_from_means)


def without(option: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The head does not hear of an option."""
    original = ops.linear_log_probs

    def deaf(*args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        options.pop(option)
        return original(*args, **options)

    return lambda patch: patch.setattr(ops, "linear_log_probs", deaf)


def maximum_from_zero(patch: pytest.MonkeyPatch) -> None:
    original = linear_log_probs_torch.add_statistics

    def add(tile: Tensor, statistics: Tensor, *args: Any, **options: Any) -> None:
        statistics[0].clamp_(min=0.0)
        original(tile, statistics, *args, **options)

    patch.setattr(linear_log_probs_torch, "add_statistics", add)


def mask_off_by_one(patch: pytest.MonkeyPatch) -> None:
    shift = packing._shift
    patch.setattr(packing, "_shift", lambda values: values if values.dtype == torch.bool else shift(values))


def drop_experts(patch: pytest.MonkeyPatch) -> None:
    loss = objective.chord_loss
    patch.setattr(objective, "chord_loss", lambda *args, mu, **options: loss(*args, mu=0.0, **options))


def ratios_over_neighbours(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sequences, "sum", lambda self, values: values.sum().expand(len(values)))


def normalise_equal_rewards(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(advantages, "_where_it_differs", lambda groups, values: values)


def lose_the_cursor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ExpertStream, "load_state_dict", lambda self, state: None)


BUGS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], None]]] = {
    "the expert term is dropped": (drop_experts, check_step),
    "the expert term is divided by the accumulation steps": (
        scaled("expert_weights", lambda batch: 1 / len(batch.micro_batches)),
        check_step,
    ),
    "the rollout term is divided by the accumulation steps": (
        scaled("rollout_weights", lambda batch: 1 / len(batch.micro_batches)),
        check_step,
    ),
    "the rollout term is divided by the tokens of two steps": (scaled("rollout_weights", lambda _: 0.5), check_step),
    "micro-batches are taken for equal": (micro_batch_means, check_step),
    "the running maximum begins at 0": (maximum_from_zero, check_step),
    "padding of the vocabulary counts": (without("vocab_size"), check_step),
    "the mask is off by one": (mask_off_by_one, check_step),
    "the trainer has no temperature": (without("temperature"), check_step),
    "ratios of sequences see their neighbours": (ratios_over_neighbours, check_step),
    "equal rewards are normalised": (normalise_equal_rewards, check_step),
    "the expert cursor is lost on resuming": (lose_the_cursor, check_resuming),
}


def test_the_step_and_the_resumed_stream_are_right():
    check_step()
    check_resuming()


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_shows(name: str, monkeypatch: pytest.MonkeyPatch):
    put_in, check = BUGS[name]
    put_in(monkeypatch)
    with pytest.raises(AssertionError):
        check()
