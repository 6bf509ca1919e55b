"""Counts what autograd keeps of each layer for each token: `kept_tensors_worker.py SETTINGS MODEL_DIR...`.

SETTINGS: JSON with `parallel`, `dtype` and `recompute`. Prints a line `MODEL_DIR [bytes a token of layer 0, ...]`.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor

from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import initialize_distributed, shut_down_distributed
from chord_megatron.backend.model import run_micro_batch, unwrap
from chord_megatron.batching.packing import build_global_batch
from chord_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from chord_megatron.types import TrainingSample

ROWS, LENGTH = 2, 64


def main(settings: str, *model_dirs: str) -> None:
    wanted = json.loads(settings)
    parallel = ParallelConfig(**wanted["parallel"])
    groups = initialize_distributed(parallel, seed=0)
    for model_dir in model_dirs:
        model = ModelConfig(path=model_dir, dtype=wanted["dtype"], recompute=wanted["recompute"])
        engine = MegatronEngine(model, parallel, OptimizerConfig(), groups, train_iters=1, keep_reference=False)
        if groups.rank == 0:
            print(model_dir, kept_by_layer(engine), flush=True)
        else:
            kept_by_layer(engine)
    shut_down_distributed()


def kept_by_layer(engine: MegatronEngine) -> list[float]:
    """Bytes a token of the memory that is first kept within each layer; parameters are no part of it."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(engine.arch.vocab_size, (LENGTH,), generator=generator) for _ in range(ROWS)]
    mask = torch.ones(LENGTH, dtype=torch.bool)
    samples = [TrainingSample(row, mask, is_expert=True, temperature=1.0) for row in rows]
    (batch,) = build_global_batch(samples, engine.batch_layout, micro_batch_size=ROWS).micro_batches
    (chunk,) = engine._chunks
    layers = unwrap(chunk).decoder.layers
    known = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    sizes, current, alive = [0] * len(layers), [-1], []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if current[0] >= 0 and storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            sizes[current[0]] += storage.nbytes()
            alive.append(tensor)  # so that no other takes its address
        return tensor

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: current.__setitem__(0, number))
        layer.register_forward_hook(lambda *_: current.__setitem__(0, -1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_micro_batch(chunk, batch, compute_entropy=True)
    return [size / (ROWS * LENGTH) for size in sizes]


if __name__ == "__main__":
    main(*sys.argv[1:])
