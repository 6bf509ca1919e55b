"""Counts what autograd keeps of each layer for each token of a rank: `kept_tensors_worker.py SETTINGS MODEL_DIR...`.

SETTINGS: JSON with `parallel`, `dtype` and `recompute`. Prints a line `MODEL_DIR [bytes a token of layer 0, ...]`.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage

from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import initialize_distributed, shut_down_distributed
from chord_megatron.backend.model import run_micro_batch, unwrap
from chord_megatron.batching.packing import build_global_batch
from chord_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from chord_megatron.types import TrainingSample

LENGTH = 64


def main(settings: str, *model_dirs: str) -> None:
    wanted = json.loads(settings)
    parallel = ParallelConfig(**wanted["parallel"])
    groups = initialize_distributed(parallel, seed=0)
    for model_dir in model_dirs:
        model = ModelConfig(path=model_dir, dtype=wanted["dtype"], recompute=wanted["recompute"])
        engine = MegatronEngine(model, parallel, OptimizerConfig(), groups, train_iters=1, keep_reference=False)
        sizes = kept_by_layer(engine)
        if groups.rank == dist.get_world_size() - 1:  # under CP the last one keeps most
            print(model_dir, sizes, flush=True)
    shut_down_distributed()


def kept_by_layer(engine: MegatronEngine) -> list[float]:
    """Bytes a token of the memory that is first kept within each layer; parameters are no part of it."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(engine.arch.vocab_size, (LENGTH,), generator=generator)
    sample = TrainingSample(row, torch.ones(LENGTH, dtype=torch.bool), is_expert=True, temperature=1.0)
    (batch,) = build_global_batch([sample], engine.batch_layout, micro_batch_size=1).micro_batches
    (chunk,) = engine._chunks
    layers = unwrap(chunk).decoder.layers
    known = {parameter.untyped_storage()._cdata for parameter in chunk.parameters()}
    kept: list[list[UntypedStorage]] = [[] for _ in layers]
    current = [-1]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if current[0] >= 0 and storage._cdata not in known:
            known.add(storage._cdata)
            kept[current[0]].append(storage)
        return tensor

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: current.__setitem__(0, number))
        layer.register_forward_hook(lambda *_: current.__setitem__(0, -1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_micro_batch(chunk, batch, compute_entropy=True)
    # Now, because what is computed again without a copy of its input gives its output's memory back.
    return [sum(storage.nbytes() for storage in storages) / len(batch.input_ids) for storages in kept]


if __name__ == "__main__":
    main(*sys.argv[1:])
