"""Trains one step on a model with a large vocabulary; prints the memory it took: `head_memory_worker.py MODEL_DIR`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

from chord_megatron.algorithm.expert_weights import phi
from chord_megatron.algorithm.objective import Objective, chord_loss
from chord_megatron.algorithm.policy_losses import clipped_policy_loss
from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import initialize_distributed, shut_down_distributed
from chord_megatron.batching.packing import build_global_batch
from chord_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from chord_megatron.types import TrainingSample

NUM_TOKENS = 2048


def main(model_dir: str) -> None:
    parallel = ParallelConfig()
    groups = initialize_distributed(parallel, seed=0)
    model = ModelConfig(path=model_dir, dtype="float32")
    engine = MegatronEngine(model, parallel, OptimizerConfig(), groups, train_iters=1, keep_reference=False)
    tokens = torch.randint(0, engine.arch.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
    sample = TrainingSample(tokens, torch.ones(NUM_TOKENS, dtype=torch.bool), is_expert=True, temperature=1.0)
    batch = build_global_batch([sample], engine.batch_layout, micro_batch_size=1)
    objective = Objective(partial(clipped_policy_loss, epsilon=0.2, epsilon_high=0.2), expert_weight=phi)
    loss = partial(chord_loss, objective=objective, mu=1.0)
    before = start_over()
    engine.forward_backward(batch, loss)
    engine.compute_log_probs(batch)
    print("extra bytes:", high_water_mark() - before)
    shut_down_distributed()


def start_over() -> int:
    """Let the high-water mark of resident memory be what it is now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return high_water_mark()


def high_water_mark() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


if __name__ == "__main__":
    main(sys.argv[1])
