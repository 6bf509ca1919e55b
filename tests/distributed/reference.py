"""CHORD again, as plainly as it can be written: the Hugging Face model in float64, one process, one sample at a time.

Only the configuration, the recorded rollouts and the order of the expert rows are shared with chord_megatron.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import reference_advantages
import reference_losses
import torch
from hash_reward import hash_reward, never, now_and_then
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from chord_megatron.config import ChordConfig, Config
from chord_megatron.data.cursor import ShuffledCursor

torch.set_num_threads(1)  # the matrices are too small for more


@dataclass(frozen=True)
class Rewards:
    """Of a completion; None where it could not be scored."""

    total: float | None
    by_function: list[float | None]
    length: int  # in tokens
    is_finished: bool  # by an end token


@dataclass(frozen=True)
class Sequence:
    """Tokens, and which of them are learnt, [length] each."""

    tokens: Tensor
    is_target: Tensor
    rewards: Rewards | None = None  # of a rollout
    advantages: Tensor | None = None  # [targets] float64, of a rollout
    sampler_log_probs: Tensor | None = None  # [targets] float64, of a rollout
    weights: Tensor | None = None  # [targets] float64, of an expert's parts


@dataclass(frozen=True)
class Step:
    """What a step of training reports."""

    loss: float
    grad_norm: float


def train(config: Config) -> list[Step]:
    """The steps of a run that replays recorded rollouts."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)
    model.get_input_embeddings().padding_idx = None  # learnt like any other token, where it is sampled
    initial_model = copy.deepcopy(model)
    optimizer = make_optimizer(model, config)
    experts = read_experts(config)
    expert_order = ShuffledCursor(len(experts), 2 * config.train.seed + 1)
    steps = []
    for step in range(config.train.train_iters):
        mu, grpo = mu_at(config.chord, step), config.grpo
        if step % (grpo.steps_per_generation * grpo.num_iterations) == 0:
            rollouts = read_rollouts(config, step) if mu < 1 else []
            old_log_probs = detached_log_probs(model, rollouts, config.rollout.temperature)
            if grpo.old_log_probs == "sampler":
                old_log_probs = [rollout.sampler_log_probs for rollout in rollouts]
            ref_log_probs = detached_log_probs(initial_model, rollouts, config.rollout.temperature)
            rollouts = with_advantages(rollouts, old_log_probs, ref_log_probs, config)
            rollouts = with_uncertain_tokens(model, rollouts, config)
        start = step % grpo.steps_per_generation * config.train.global_batch_size
        of_step = slice(start, start + config.train.global_batch_size)
        of_rollouts = (values[of_step] for values in (rollouts, old_log_probs, ref_log_probs))
        loss = (1 - mu) * rollout_loss(model, *of_rollouts, config)
        if mu > 0:
            rows = expert_order.next(config.chord.chord_sft_global_batch_size)
            loss = loss + mu * expert_loss(model, [experts[row] for row in rows], config.chord)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        steps.append(Step(loss.item(), grad_norm.item()))
    return steps


def mu_at(chord: ChordConfig, step: int) -> float:
    """Cosine from peak to valley; no case warms up."""
    assert chord.chord_mu_warmup_steps == 0
    if step >= chord.chord_mu_decay_steps:
        return chord.chord_mu_valley
    share = (1 + math.cos(math.pi * step / chord.chord_mu_decay_steps)) / 2
    return chord.chord_mu_valley + (chord.chord_mu_peak - chord.chord_mu_valley) * share


def rollout_loss(
    model: PreTrainedModel,
    rollouts: list[Sequence],
    old_log_probs: list[Tensor],
    ref_log_probs: list[Tensor],
    config: Config,
) -> Tensor:
    """The policy loss with its weights, penalty and bonus, and the mean of its type."""
    if not rollouts:
        return torch.zeros((), dtype=torch.float64)
    grpo = config.grpo
    losses = []
    for rollout, old, ref in zip(rollouts, old_log_probs, ref_log_probs):
        log_probs, entropy = target_log_probs_and_entropy(model, rollout, config.rollout.temperature)
        loss = reference_losses.token_losses(log_probs, old, rollout.advantages, grpo)
        if grpo.off_policy_sequence_mask_delta is not None:
            drift = (rollout.sampler_log_probs - log_probs.detach()).mean()
            loss = loss * (not (rollout.advantages.sum() < 0 and drift > grpo.off_policy_sequence_mask_delta))
        if grpo.rollout_importance_sampling_mode is not None:
            assert grpo.rollout_importance_sampling_mode == "sequence_mask"
            log_weights = old - rollout.sampler_log_probs
            is_kept = log_weights.mean() <= math.log(grpo.rollout_importance_sampling_threshold)
            loss = loss * torch.exp(log_weights) * is_kept
        if not grpo.kl_in_reward:
            loss = loss + grpo.beta * reference_losses.kl(log_probs, ref, grpo.kl_estimator)
        losses.append(loss - grpo.entropy_coef * entropy)
    return reference_losses.mean(losses, grpo.loss_type, config.rollout.max_completion_length)


def with_advantages(
    rollouts: list[Sequence], old_log_probs: list[Tensor], ref_log_probs: list[Tensor], config: Config
) -> list[Sequence]:
    """The group-normalised rewards, the penalty of the reference taken from them where that is asked for."""
    if not rollouts:
        return []
    penalty = config.grpo.beta if config.grpo.kl_in_reward else 0.0
    totals = [
        None if rollout.rewards.total is None else rollout.rewards.total - penalty * (old - ref).sum().item()
        for rollout, old, ref in zip(rollouts, old_log_probs, ref_log_probs)
    ]
    by_function = [*zip(*(rollout.rewards.by_function for rollout in rollouts))]
    lengths = [rollout.rewards.length for rollout in rollouts]
    advantages = reference_advantages.advantages(totals, by_function, lengths, config)
    return [
        replace(rollout, advantages=torch.full((len(old),), advantage).double())
        for rollout, old, advantage in zip(rollouts, old_log_probs, advantages)
    ]


@torch.no_grad()
def with_uncertain_tokens(model: PreTrainedModel, rollouts: list[Sequence], config: Config) -> list[Sequence]:
    """Advantages on the step's tokens of the highest entropy alone."""
    share = config.grpo.top_entropy_quantile
    if share == 1 or not rollouts:
        return rollouts
    temperature = config.rollout.temperature
    entropies = [target_log_probs_and_entropy(model, rollout, temperature)[1] for rollout in rollouts]
    threshold = torch.quantile(torch.cat(entropies), 1 - share)
    kept = [entropy >= threshold for entropy in entropies]
    assert 0 < sum(int(keep.sum()) for keep in kept) < 0.5 * sum(map(len, kept))
    return [replace(rollout, advantages=rollout.advantages * keep) for rollout, keep in zip(rollouts, kept)]


def expert_loss(model: PreTrainedModel, experts: list[Sequence], chord: ChordConfig) -> Tensor:
    """The mean negative log-likelihood of the expert tokens, each weighted."""
    total, num_tokens = torch.zeros((), dtype=torch.float64), 0
    for expert in experts:
        log_probs, entropy = target_log_probs_and_entropy(model, expert, temperature=1.0)
        weights = reference_advantages.expert_weights(log_probs.detach(), entropy.detach(), chord)
        total = total - (weights * expert.weights * log_probs).sum()
        num_tokens += len(log_probs)
    return total / num_tokens


def target_log_probs(model: PreTrainedModel, sequence: Sequence, temperature: float) -> Tensor:
    """[targets] log-probs of the tokens that are learnt."""
    return target_log_probs_and_entropy(model, sequence, temperature)[0]


def target_log_probs_and_entropy(
    model: PreTrainedModel, sequence: Sequence, temperature: float
) -> tuple[Tensor, Tensor]:
    """[targets] of the tokens that are learnt."""
    logits = model(input_ids=sequence.tokens[None]).logits[0, :-1] / temperature
    everything = torch.log_softmax(logits, dim=-1)[sequence.is_target[1:]]
    targets = sequence.tokens[1:][sequence.is_target[1:]]
    return everything.gather(1, targets[:, None]).squeeze(1), -(everything.exp() * everything).sum(-1)


@torch.no_grad()
def detached_log_probs(model: PreTrainedModel, sequences: list[Sequence], temperature: float) -> list[Tensor]:
    """`target_log_probs` of each, as constants."""
    return [target_log_probs(model, sequence, temperature) for sequence in sequences]


def make_optimizer(model: PreTrainedModel, config: Config) -> torch.optim.Optimizer:
    """AdamW; as in Megatron, biases and norms do not decay."""
    optimizer = config.optimizer
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=optimizer.lr,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        eps=optimizer.adam_eps,
        weight_decay=optimizer.weight_decay,
    )


def read_rollouts(config: Config, step: int) -> list[Sequence]:
    """The recorded completions of a step, with their rewards."""
    assert config.rollout.replay_from is not None
    records = [record for record in read_jsonl(config.rollout.replay_from) if record["step"] == step]
    records.sort(key=lambda record: record["sample_index"])
    prompts = read_jsonl(config.data.dataset)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    texts = [chat(tokenizer, prompts[record["prompt_id"]]["prompt"]) for record in records]
    lengths = [sum(record["response_mask"]) for record in records]
    by_function = []
    for name in config.rewards.reward_funcs:
        if name == "soft_overlong":
            by_function.append(reference_advantages.soft_overlong(lengths, config))
            continue
        function = {"hash_reward": hash_reward, "now_and_then": now_and_then, "never": never}[name.rpartition(":")[2]]
        by_function.append(function(texts, [completion(tokenizer, record) for record in records], []))
    totals = reference_advantages.total_rewards(by_function, config)
    if totals == [None] * len(totals):
        return []
    sequences = []
    for record, reward, *of_functions in zip(records, totals, *by_function):
        is_target = torch.tensor(record["response_mask"]) & (reward is not None)
        sampler_log_probs = torch.tensor(record["rollout_log_probs"], dtype=torch.float64)[is_target]
        length = sum(record["response_mask"])
        rewards = Rewards(reward, of_functions, length, record["finish_reason"] == "stop")
        sequences.append(
            Sequence(torch.tensor(record["tokens"]), is_target, rewards, sampler_log_probs=sampler_log_probs)
        )
    return sequences


def read_experts(config: Config) -> list[Sequence]:
    """Prompt, answer and end token of each row."""
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    experts = []
    for row in read_jsonl(config.chord.chord_sft_dataset):
        prompt = tokenizer.encode(chat(tokenizer, row["prompt"]), add_special_tokens=False)
        parts = [(row["answer"], 1.0)] if isinstance(row["answer"], str) else row["answer"]
        of_characters = [weight for text, weight in parts for _ in text]
        text = "".join(text for text, _ in parts)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        weights = [of_characters[start] for start, _ in encoded["offset_mapping"]] + [parts[-1][1]]
        tokens = torch.tensor([*prompt, *encoded["input_ids"], tokenizer.eos_token_id])
        is_target = torch.tensor([False] * len(prompt) + [weight > 0 for weight in weights])
        of_targets = torch.tensor([weight for weight in weights if weight > 0], dtype=torch.float64)
        experts.append(Sequence(tokens, is_target, weights=of_targets))
    return experts


def chat(tokenizer: Any, question: str) -> str:
    """The question as the model reads it."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def completion(tokenizer: Any, record: dict[str, Any]) -> str:
    """The text of a recorded completion."""
    tokens = [token for token, keep in zip(record["tokens"], record["response_mask"]) if keep]
    return tokenizer.decode(tokens[:-1] if record["finish_reason"] == "stop" else tokens)


def read_jsonl(path: str | Path | None) -> list[dict[str, Any]]:
    """One object a line."""
    assert path is not None
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
