"""ms-swift's and Trinity-RFT's CHORD as plainly as they can be written: one process, micro-batch by micro-batch.

From their formulas (chord_megatron/algorithm/presets.py names the files), in float64. A micro-batch's loss is taken and
its gradient added before the next one begins, as they do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from reference import (
    Sequence,
    Step,
    detached_log_probs,
    make_optimizer,
    read_experts,
    read_rollouts,
    target_log_probs,
    with_advantages,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from chord_megatron.algorithm.mu import mu_schedule
from chord_megatron.config import Config
from chord_megatron.data.cursor import ShuffledCursor

Row = TypeVar("Row")


class Run(NamedTuple):
    """What both trainers have."""

    config: Config
    model: PreTrainedModel
    initial_model: PreTrainedModel
    experts: list[Sequence]
    order: ShuffledCursor


def train(config: Config) -> list[Step]:
    """The steps of a run that replays recorded rollouts, on one rank."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)
    model.get_input_embeddings().padding_idx = None
    optimizer, experts = make_optimizer(model, config), read_experts(config)
    order = ShuffledCursor(len(experts), 2 * config.train.seed + 1)
    run = Run(config, model, copy.deepcopy(model), experts, order)
    micro_batch_losses = {"ms-swift": ms_swift, "trinity": trinity}[config.chord.semantics]
    steps = []
    for step in range(config.train.train_iters):
        optimizer.zero_grad()
        total = 0.0
        for loss in micro_batch_losses(run, step):
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        steps.append(Step(total, norm.item()))
    return steps


def ms_swift(run: Run, step: int) -> Iterator[Tensor]:
    """Each micro-batch mixes a mean of completions and a mean of fresh expert rows; the trainer averages over them."""
    model, config = run.model, run.config
    mu = mu_at(config, step)
    rollouts = scored_rollouts(config, step)
    num_tokens = sum(int(rollout.is_target.sum()) for rollout in rollouts)
    size = config.train.micro_batch_size
    accumulation_steps = len(rollouts) // size
    for micro_batch in cut(rollouts, size):
        losses = policy_losses(model, micro_batch, config)
        losses = [
            with_penalty(model, run.initial_model, rollout, loss, config) for rollout, loss in zip(micro_batch, losses)
        ]
        if config.grpo.loss_type == "grpo":
            grpo = torch.stack([loss.mean() for loss in losses]).mean()
        elif config.grpo.loss_type == "bnpo":
            grpo = torch.cat(losses).mean()
        else:
            assert config.grpo.loss_type == "dapo"
            grpo = torch.cat(losses).sum() / num_tokens
        loss = (1 - mu) * grpo
        if mu > 0:
            rows = run.order.next(config.chord.chord_sft_per_device_train_batch_size)
            loss = loss + mu * torch.cat(expert_losses(model, [run.experts[row] for row in rows], config, 1.0)).mean()
        yield loss / accumulation_steps


def trinity(run: Run, step: int) -> Iterator[Tensor]:
    """Completions, then expert rows, are cut into micro-batches; each stream's token mean counts by its rows."""
    model, config = run.model, run.config
    mu = mu_at(config, step + 1)
    temperature = config.rollout.temperature
    rollouts = scored_rollouts(config, step)
    rows = [run.experts[row] for row in run.order.next(config.chord.chord_sft_global_batch_size)]
    marked: list[tuple[Sequence, bool]] = [*((each, False) for each in rollouts), *((each, True) for each in rows)]
    for micro_batch in cut(marked, config.train.micro_batch_size):
        usual = [sequence for sequence, is_expert in micro_batch if not is_expert]
        expert = [sequence for sequence, is_expert in micro_batch if is_expert]
        loss = torch.zeros((), dtype=torch.float64)
        if usual:
            loss = loss + (1 - mu) * torch.cat(policy_losses(model, usual, config)).mean() * len(usual) / len(rollouts)
        if expert:
            of_experts = torch.cat(expert_losses(model, expert, config, temperature)).mean()
            loss = loss + mu * of_experts * len(expert) / len(rows)
        yield loss


def cut(rows: list[Row], size: int) -> list[list[Row]]:
    """Micro-batches of `size` rows."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def mu_at(config: Config, step: int) -> float:
    """The schedule that all three share (its values are tested by hand)."""
    chord: Any = config.chord
    return mu_schedule(
        step,
        peak=chord.chord_mu_peak,
        valley=chord.chord_mu_valley,
        warmup_steps=chord.chord_mu_warmup_steps,
        decay_steps=chord.chord_mu_decay_steps,
    )


def scored_rollouts(config: Config, step: int) -> list[Sequence]:
    """The recorded completions of a step with their advantages; no reference model takes part."""
    rollouts = read_rollouts(config, step)
    nothing = [torch.zeros(int(rollout.is_target.sum())) for rollout in rollouts]
    return with_advantages(rollouts, nothing, nothing, config)


def policy_losses(model: PreTrainedModel, rollouts: list[Sequence], config: Config) -> list[Tensor]:
    """The on-policy surrogate of each completion's tokens: the ratio is 1, its gradient is not 0."""
    old = detached_log_probs(model, rollouts, config.rollout.temperature)
    losses = []
    for rollout, before in zip(rollouts, old):
        ratio = torch.exp(target_log_probs(model, rollout, config.rollout.temperature) - before)
        clipped = torch.clip(ratio, 1 - config.grpo.epsilon, 1 + config.grpo.epsilon)
        losses.append(-torch.minimum(ratio * rollout.advantages, clipped * rollout.advantages))
    return losses


def with_penalty(
    model: PreTrainedModel, initial_model: PreTrainedModel, rollout: Sequence, loss: Tensor, config: Config
) -> Tensor:
    """The KL penalty is added, both are weighted, and a completion without an end token weighs nothing."""
    grpo, temperature = config.grpo, config.rollout.temperature
    log_probs = target_log_probs(model, rollout, temperature)
    if grpo.beta:
        (reference,) = detached_log_probs(initial_model, [rollout], temperature)
        difference = torch.clamp(reference - log_probs, -20, 20)
        loss = loss + grpo.beta * torch.clamp(torch.exp(difference) - difference - 1, -10, 10)
    if grpo.rollout_importance_sampling_mode is not None:
        assert grpo.rollout_importance_sampling_mode == "token_truncate" and rollout.sampler_log_probs is not None
        ratio = torch.exp(torch.clamp(log_probs.detach() - rollout.sampler_log_probs, -20, 20))
        loss = loss * torch.clamp(ratio, max=grpo.rollout_importance_sampling_threshold)
    return loss * (rollout.rewards.is_finished or not grpo.overlong_filter)


def expert_losses(model: PreTrainedModel, rows: list[Sequence], config: Config, temperature: float) -> list[Tensor]:
    """-log p of each answer's tokens, times p (1 - p) with phi."""
    losses = []
    for row in rows:
        log_probs = target_log_probs(model, row, temperature)
        p = torch.exp(log_probs).detach()
        losses.append(-log_probs * (p * (1 - p) if config.chord.chord_enable_phi_function else 1.0))
    return losses
