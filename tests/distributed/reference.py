"""CHORD again, as plainly as it can be written: the Hugging Face model in float64, one process, one sample at a time.

Only the configuration, the recorded rollouts and the order of the expert rows are shared with chord_megatron.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hash_reward import hash_reward
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from chord_megatron.config import ChordConfig, Config
from chord_megatron.data.cursor import ShuffledCursor

torch.set_num_threads(1)  # the matrices are too small for more


@dataclass(frozen=True)
class Sequence:
    """Tokens, and which of them are learnt, [length] each."""

    tokens: Tensor
    is_target: Tensor
    advantage: float = 0.0
    sampler_log_probs: Tensor | None = None  # [targets] float64, of a rollout


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
        mu = mu_at(config.chord, step)
        if step % config.grpo.num_iterations == 0:
            rollouts = read_rollouts(config, step) if mu < 1 else []
            old_log_probs = detached_log_probs(model, rollouts, config.rollout.temperature)
            ref_log_probs = detached_log_probs(initial_model, rollouts, config.rollout.temperature)
        loss = (1 - mu) * rollout_loss(model, rollouts, old_log_probs, ref_log_probs, config)
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
    """The clipped GRPO loss with its KL penalty: the token mean, or the mean of sequence means."""
    if not rollouts:
        return torch.zeros((), dtype=torch.float64)
    grpo = config.grpo
    epsilon_high = grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high
    sums, lengths = [], []
    for rollout, old, ref in zip(rollouts, old_log_probs, ref_log_probs):
        log_probs = target_log_probs(model, rollout, config.rollout.temperature)
        ratio = torch.exp(log_probs - old)
        clipped = torch.clip(ratio, 1 - grpo.epsilon, 1 + epsilon_high)
        loss = -torch.minimum(ratio * rollout.advantage, clipped * rollout.advantage)
        if grpo.rollout_importance_sampling_mode is not None:
            assert grpo.rollout_importance_sampling_mode == "sequence_mask"
            log_weights = old - rollout.sampler_log_probs
            is_kept = log_weights.mean() <= math.log(grpo.rollout_importance_sampling_threshold)
            loss = loss * torch.exp(log_weights) * is_kept
        difference = ref - log_probs
        loss = loss + grpo.beta * (torch.exp(difference) - difference - 1)
        sums.append(loss.sum())
        lengths.append(len(log_probs))
    if grpo.loss_type == "dapo":
        return sum(sums) / sum(lengths)
    assert grpo.loss_type == "grpo"
    return sum(total / length for total, length in zip(sums, lengths)) / len(rollouts)


def expert_loss(model: PreTrainedModel, experts: list[Sequence], chord: ChordConfig) -> Tensor:
    """The mean negative log-likelihood of the expert tokens, each weighted by p (1 - p) with phi."""
    total, num_tokens = torch.zeros((), dtype=torch.float64), 0
    for expert in experts:
        log_probs = target_log_probs(model, expert, temperature=1.0)
        p = torch.exp(log_probs).detach()
        weights = p * (1 - p) if chord.chord_enable_phi_function else torch.ones_like(p)
        total = total - (weights * log_probs).sum()
        num_tokens += len(log_probs)
    return total / num_tokens


def target_log_probs(model: PreTrainedModel, sequence: Sequence, temperature: float) -> Tensor:
    """[targets] log-probs of the tokens that are learnt."""
    logits = model(input_ids=sequence.tokens[None]).logits[0, :-1] / temperature
    log_probs = torch.log_softmax(logits, dim=-1).gather(1, sequence.tokens[1:, None]).squeeze(1)
    return log_probs[sequence.is_target[1:]]


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


def read_rollouts(config: Config, step: int, eps: float = 1e-6) -> list[Sequence]:
    """The recorded completions of a step, with the advantages of their rewards."""
    assert config.rollout.replay_from is not None
    records = [record for record in read_jsonl(config.rollout.replay_from) if record["step"] == step]
    records.sort(key=lambda record: record["sample_index"])
    prompts = read_jsonl(config.data.dataset)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    sequences = []
    for start in range(0, len(records), config.rollout.num_generations):
        group = records[start : start + config.rollout.num_generations]
        prompt = chat(tokenizer, prompts[group[0]["prompt_id"]]["prompt"])
        rewards = hash_reward([prompt] * len(group), [completion(tokenizer, record) for record in group], [])
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
        for record, reward in zip(group, rewards):
            is_target = torch.tensor(record["response_mask"])
            sampler_log_probs = torch.tensor(record["rollout_log_probs"], dtype=torch.float64)[is_target]
            advantage = (reward - mean) / (std + eps)
            sequences.append(Sequence(torch.tensor(record["tokens"]), is_target, advantage, sampler_log_probs))
    return sequences


def read_experts(config: Config) -> list[Sequence]:
    """Prompt, answer and end token of each row."""
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    experts = []
    for row in read_jsonl(config.chord.chord_sft_dataset):
        prompt = tokenizer.encode(chat(tokenizer, row["prompt"]), add_special_tokens=False)
        answer = [*tokenizer.encode(row["answer"], add_special_tokens=False), tokenizer.eos_token_id]
        is_target = [False] * len(prompt) + [True] * len(answer)
        experts.append(Sequence(torch.tensor(prompt + answer), torch.tensor(is_target)))
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
