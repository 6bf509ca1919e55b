"""Attention and losses of sequences that are spread over ranks: `context_parallel_worker.py RANKS RESULTS.pt`.

test_context_parallel.py calls the same functions without other ranks. Everything is float64.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from chord_megatron.algorithm.importance import ImportanceCorrection
from chord_megatron.algorithm.objective import Objective, chord_loss
from chord_megatron.algorithm.policy_losses import (
    KL_ESTIMATORS,
    RATIO_LEVELS,
    clipped_policy_loss,
    gmpo_policy_loss,
    vespo_policy_loss,
)
from chord_megatron.backend.context_attention import context_attention
from chord_megatron.backend.groups import initialize_distributed, shut_down_distributed
from chord_megatron.batching.packing import BatchLayout, build_global_batch
from chord_megatron.config import ParallelConfig
from chord_megatron.types import GlobalBatch, MicroBatch, TrainingSample

LENGTHS = (7, 1, 16, 7, 2, 12, 25)  # some are no multiple of 2 x CP, two are the same, two have chunks of padding alone
ADVANTAGES = (1.5, 0.0, -1.0, 0.0, 0.0, -0.5, 1.0)
HEADS, GROUPS, KEY_SIZE, VALUE_SIZE, SCALE = 4, 2, 8, 5, 0.4
CLIPPED = partial(clipped_policy_loss, epsilon=0.1, epsilon_high=0.2)
GSPO = partial(clipped_policy_loss, epsilon=0.02, epsilon_high=0.02)
OBJECTIVES = {
    "tokens": Objective(CLIPPED, beta=0.1, entropy_coef=0.2, expert_weight=lambda lp, h: lp.exp() * (1 - lp.exp())),
    "GSPO": Objective(GSPO, RATIO_LEVELS["sequence"]),
    "GSPO-token": Objective(GSPO, RATIO_LEVELS["sequence_token"], beta=0.1, kl_estimator=KL_ESTIMATORS["k2"]),
    "gmpo": Objective(partial(gmpo_policy_loss, epsilon=0.4, epsilon_high=0.4)),
    "vespo": Objective(
        partial(vespo_policy_loss, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0)
    ),
    "sequence_mask": Objective(CLIPPED, importance=ImportanceCorrection("sequence_mask", 1.2)),
    "sequence_truncate": Objective(CLIPPED, importance=ImportanceCorrection("sequence_truncate", 1.1, "product")),
    "off-policy mask": Objective(CLIPPED, off_policy_delta=-0.05),
}
MU = 0.3


def make_samples() -> list[TrainingSample]:
    """Every third is an expert's; a completion is half of its sequence, and one has no advantage."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for index, length in enumerate(LENGTHS):
        is_expert = index % 3 == 1
        now = torch.cat([torch.zeros(1), log_probs_of(index)[: length - 1].float()])  # of the model
        drawn = [now + 0.3 * torch.randn(length, generator=generator) for _ in range(3)]
        rollout, old, ref = (None, None, None) if is_expert else drawn
        samples.append(
            TrainingSample(
                tokens=torch.randint(0, 50, (length,), generator=generator),
                loss_mask=torch.arange(length) >= max(1, length // 2),
                is_expert=is_expert,
                temperature=1.0,
                advantage=ADVANTAGES[index],
                rollout_log_probs=rollout,
                old_log_probs=old,
                ref_log_probs=ref,
            )
        )
    return samples


def log_probs_of(index: int) -> Tensor:
    """[length + 1] of a sample's labels, position t of token t + 1."""
    generator = torch.Generator().manual_seed(5000 + index)
    return -0.7 * torch.randn(LENGTHS[index] + 1, generator=generator, dtype=torch.float64).abs()


def batch_of(rank: int = 0, size: int = 1) -> GlobalBatch:
    """A rank's share of two micro-batches."""
    layout = BatchLayout(cp_rank=rank, cp_size=size, pad_to_multiple=3)
    return build_global_batch(make_samples(), layout, micro_batch_size=4)


def of_tokens(batch: MicroBatch, shape: tuple[int, ...], seed: int) -> Tensor:
    """[tokens, *shape] random numbers that belong to a sample's tokens, whoever has them; 0 for padding."""
    values = torch.zeros(len(batch.input_ids), *shape, dtype=torch.float64)
    for slot, index in enumerate(batch.sample_indices):
        own = slice(int(batch.cu_seqlens[slot]), int(batch.cu_seqlens[slot + 1]))
        generator = torch.Generator().manual_seed(1000 * seed + index)
        whole = torch.randn(LENGTHS[index] + 1, *shape, generator=generator, dtype=torch.float64)
        whole[LENGTHS[index]] = 0
        values[own] = whole[batch.position_ids[own].clamp(max=LENGTHS[index])]
    return values


def attended(batch: MicroBatch, attention: Any) -> list[Tensor]:
    """Output and gradients of query, key and value, [tokens, ...] each, under random gradients of the output."""
    shapes = ((HEADS, KEY_SIZE), (GROUPS, KEY_SIZE), (GROUPS, VALUE_SIZE))
    inputs = [of_tokens(batch, shape, seed).requires_grad_() for seed, shape in enumerate(shapes)]
    output = attention(*inputs, batch.cu_seqlens, scale=SCALE)
    gradient = of_tokens(batch, (HEADS * VALUE_SIZE,), seed=3)
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]


def loss_of(batch: MicroBatch, objective: Objective, **group: Any) -> dict[str, Any]:
    """What `chord_loss` says of random log-probs and entropies, and the gradient of the log-probs."""
    log_probs = -0.7 * of_tokens(batch, (), seed=5).abs()  # `log_probs_of`
    log_probs.requires_grad_()
    entropy = of_tokens(batch, (), seed=6).abs()
    result = chord_loss(log_probs, entropy, batch, objective=objective, mu=MU, **group)
    (gradient,) = torch.autograd.grad(result.loss, log_probs)
    return {
        "loss": result.loss.detach(),
        **result.sums,
        **{name: values[: len(batch.sample_indices)] for name, values in result.rows.items()},
        "gradient": gradient,
    }


def everything(batches: GlobalBatch, attention: Any, **group: Any) -> dict[str, Any]:
    """By what it is of: numbers, or the rows of samples by their index."""
    answers: dict[str, Any] = {}
    for number, batch in enumerate(batches.micro_batches):
        for name, values in zip(("output", "query", "key", "value"), attended(batch, attention)):
            answers[f"attention: {name} {number}"] = rows(batch, values)
        for name, objective in OBJECTIVES.items():
            for key, values in loss_of(batch, objective, **group).items():
                answers[f"{name}: {key} {number}"] = rows(batch, values) if key == "gradient" else values
    return answers


def rows(batch: MicroBatch, values: Tensor) -> Tensor:
    """[samples of the micro-batch, longest, ...]: each token's at its position, 0 where others have it."""
    whole = values.new_zeros(len(batch.sample_indices), max(LENGTHS), *values.shape[1:])
    for slot, index in enumerate(batch.sample_indices):
        own = slice(int(batch.cu_seqlens[slot]), int(batch.cu_seqlens[slot + 1]))
        positions = batch.position_ids[own]
        is_token = positions < LENGTHS[index]
        whole[slot, positions[is_token]] = values[own][is_token]
    return whole


def main(size: int, results: str) -> None:
    """The sums over all ranks; rank 0 writes."""
    groups = initialize_distributed(ParallelConfig(context_parallel_size=size), seed=0)
    assert groups.cp_group is not None
    attention = partial(context_attention, group=groups.cp_group)
    answers = everything(batch_of(groups.cp_rank, groups.cp_size), attention, cp_group=groups.cp_group)
    for values in answers.values():
        dist.all_reduce(values)
    if groups.rank == 0:
        torch.save(answers, results)
    shut_down_distributed()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
