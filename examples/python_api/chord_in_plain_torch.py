"""A CHORD step of any torch model, with `ops` and `algorithm` alone: no Megatron-Core, no configuration."""

from functools import partial

import torch
from transformers import Qwen3Config, Qwen3Model

from chord_megatron.algorithm.advantages import group_advantages
from chord_megatron.algorithm.expert_weights import phi
from chord_megatron.algorithm.objective import Objective, chord_loss
from chord_megatron.algorithm.policy_losses import clipped_policy_loss
from chord_megatron.batching.packing import BatchLayout, build_global_batch
from chord_megatron.ops import linear_log_probs
from chord_megatron.types import TrainingSample

torch.manual_seed(0)
model = Qwen3Model(Qwen3Config(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                               num_attention_heads=4, num_key_value_heads=2, head_dim=8))  # fmt: skip
head = torch.nn.Parameter(0.1 * torch.randn(100, 32))
optimizer = torch.optim.Adam([*model.parameters(), head], lr=1e-2)

prompt, rewards = torch.arange(5), torch.tensor([1.0, 0.0, 0.0, 1.0])  # of four completions, in one group
sequences = [torch.cat([prompt, torch.randint(100, (7,))]) for _ in range(5)]  # the last is the expert's
answer = torch.arange(12) >= len(prompt)
samples = [TrainingSample(sequences.pop(), answer, is_expert=True, temperature=1.0)]
for tokens, advantage in zip(sequences, group_advantages(rewards, 4).tolist(), strict=True):
    samples.append(TrainingSample(tokens, answer, is_expert=False, temperature=1.0, advantage=advantage))

objective = Objective(partial(clipped_policy_loss, epsilon=0.2, epsilon_high=0.28), expert_weight=phi)
batch = build_global_batch(samples, BatchLayout(dp_rank=0, dp_size=1), micro_batch_size=1)
for step in range(3):
    for micro_batch in batch.micro_batches:  # each loss has the step's denominators: they simply add up
        hidden = model(micro_batch.input_ids[None]).last_hidden_state[0]
        log_probs, entropy = linear_log_probs(hidden, head, micro_batch.labels, valid=micro_batch.counts)
        chord_loss(log_probs, entropy, micro_batch, objective=objective, mu=0.3).loss.backward()
    print(f"step {step}: gradient norm {torch.nn.utils.clip_grad_norm_([*model.parameters(), head], 1.0):.4f}")
    optimizer.step()
    optimizer.zero_grad()
