"""Gradients and kept activations of models under each way of recomputation: `recompute_worker.py QUESTIONS RESULTS`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models_worker import as_sample, generate
from torch import Tensor

from chord_megatron.algorithm.objective import Objective, chord_loss
from chord_megatron.algorithm.policy_losses import clipped_policy_loss
from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import ParallelGroups, initialize_distributed, shut_down_distributed
from chord_megatron.batching.packing import build_global_batch
from chord_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from chord_megatron.types import LossResult, SamplingParams


def main(questions: dict[str, Any], results: Path) -> None:
    """Answer for each model and way; each rank writes its own."""
    parallel = ParallelConfig(**questions["parallel"])
    groups = initialize_distributed(parallel, seed=0)
    answers = {
        (name, way): answer(ModelConfig(path=path, dtype="float32", **settings), parallel, groups, questions)
        for name, path in questions["models"].items()
        for way, settings in questions["ways"][name].items()
    }
    torch.save(answers, results / f"{groups.rank}.pt")
    dist.barrier()
    shut_down_distributed()


def answer(
    model: ModelConfig, parallel: ParallelConfig, groups: ParallelGroups, questions: dict[str, Any]
) -> dict[str, Any]:
    """The loss of one micro-batch, this rank's gradients, the bytes kept for them, and greedy completions."""
    engine = MegatronEngine(model, parallel, OptimizerConfig(), groups, train_iters=1, keep_reference=False)
    samples = [as_sample(tokens, temperature=1.0) for tokens in questions["sequences"]]
    batch = build_global_batch(samples, engine.batch_layout, micro_batch_size=len(samples))
    objective = Objective(partial(clipped_policy_loss, epsilon=0.2, epsilon_high=0.2))
    parameters = [parameter for chunk in engine._chunks for parameter in chunk.parameters()]
    kept: list[Tensor] = []
    kept_bytes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    def loss(*arguments: Any) -> LossResult:
        """Called between the forward and the backward pass."""
        kept_bytes.append(bytes_of(kept, parameters))
        return chord_loss(*arguments, objective=objective, mu=1.0)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        totals = engine.forward_backward(batch, loss)
    prompts = questions["sequences"][:2]
    completions = generate(engine, prompts, [(0, 0), (0, 1)], SamplingParams(temperature=0, max_completion_length=6))
    return {
        "loss": totals.sums["loss_expert"],
        "gradients": [parameter.main_grad.clone() for parameter in parameters],
        "kept_bytes": kept_bytes,
        "completions": [tokens for tokens, _ in completions],
    }


def bytes_of(kept: list[Tensor], parameters: list[Tensor]) -> int:
    """Of the storages below, each once; parameters are there anyway."""
    of_model = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in kept}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in of_model)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
