"""Trains each model with and without offloading, and measures memory: `offload_worker.py QUESTIONS.json RESULTS.pt`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models_worker import MICRO_BATCH_SIZE, as_sample, copy_weights, train_step
from torch import Tensor

from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import ParallelGroups, initialize_distributed, shut_down_distributed
from chord_megatron.batching.packing import build_global_batch
from chord_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from chord_megatron.types import GlobalBatch, SamplingParams, TrainingSample

PROMPTS, SEEDS, SAMPLING = [[5, 6, 7]], [(0, 0)], SamplingParams(max_completion_length=4)
Visit = Callable[[MegatronEngine, dict[str, bool]], None]


def main(questions: dict[str, Any], results: Path) -> None:
    """Answer for each case; rank 0 writes."""
    samples = [as_sample(tokens, temperature=1.0) for tokens in questions["sequences"]]
    parallel = ParallelConfig(**questions["parallel"])
    groups = initialize_distributed(parallel, seed=0)
    answers = {
        name: answer(case, parallel, groups, samples, results.parent / name.replace(" ", "_"))
        for name, case in questions["cases"].items()
    }
    if groups.rank == 0:
        torch.save(answers, results)
    shut_down_distributed()


def answer(
    case: dict[str, Any],
    parallel: ParallelConfig,
    groups: ParallelGroups,
    samples: list[TrainingSample],
    folder: Path,
) -> dict[str, Any]:
    def new_engine() -> MegatronEngine:
        model = ModelConfig(path=case["path"], dtype=case["dtype"])
        optimizer = OptimizerConfig(lr=0.01, use_distributed_optimizer=case["distributed_optimizer"])
        return MegatronEngine(model, parallel, optimizer, groups, train_iters=3, keep_reference=False)

    plain = train(new_engine(), samples, folder / "plain", leave=lambda engine, parts: None)
    visits: list[dict[str, Any]] = []
    engine = new_engine()
    offloaded = train(
        engine, samples, folder / "offloaded", leave=lambda engine, parts: visits.append(visit(engine, parts, samples))
    )
    mine = {"visits": visits, "buffers": describe_buffers(engine)}
    everyone: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {
        "plain": plain,
        "offloaded": offloaded,
        "ranks": everyone,
        "raised": raise_inside(engine),
        "lost_gradients": step_on_lost_gradients(engine),
    }


def train(engine: MegatronEngine, samples: list[TrainingSample], checkpoint: Path, *, leave: Visit) -> dict[str, Any]:
    """Losses and gradient norms of three steps, and the weights; `leave` is called before, between and after them."""
    leave(engine, {"optimizer": True, "model": True})
    steps = [train_step(engine, samples)]
    leave(engine, {"optimizer": True, "model": False})
    steps.append(train_step(engine, samples))
    leave(engine, {"optimizer": False, "model": True})
    engine.save(checkpoint, {})
    engine.load(checkpoint)
    leave(engine, {"optimizer": True, "model": True})
    steps.append(train_step(engine, samples))
    return {"steps": steps, "weights": copy_weights(engine)}


def visit(engine: MegatronEngine, parts: dict[str, bool], samples: list[TrainingSample]) -> dict[str, Any]:
    """What an offloaded engine holds and refuses to do, and whether it does the rest as before."""
    before, expected = held(engine), use_model(engine, samples)
    with engine.offloaded(**parts):
        inside = held(engine)
        # What comes by next gets the memory: bytes that were not copied do not come back by luck.
        others = [torch.full((size,), 255, dtype=torch.uint8) for size in before["storages"]]
        is_same = parts["model"] or torch.equal(use_model(engine, samples), expected)
        refused = [name for name, call in calls(engine, samples, parts).items() if is_refused(call)]
    del others
    return {
        "before": before,
        "inside": inside,
        "after": held(engine),
        "is_same_inside": is_same,
        "is_same_afterwards": torch.equal(use_model(engine, samples), expected),
        "refused": refused,
        "gradients_left": sum(int(gradient.count_nonzero()) for gradient in tensors(engine)["gradients"]),
    }


def use_model(engine: MegatronEngine, samples: list[TrainingSample]) -> Tensor:
    """All that works without an optimizer, in one tensor: log-probs, completions, exported weights."""
    log_probs = engine.compute_log_probs(as_batch(engine, samples))
    completions = [values for row in engine.generate(PROMPTS, SEEDS, SAMPLING) for values in row]
    weights = [tensor.double().flatten() for _, tensor in engine.export_hf_weights()]
    return torch.cat([*log_probs, *completions, *weights])


def as_batch(engine: MegatronEngine, samples: list[TrainingSample]) -> GlobalBatch:
    return build_global_batch(samples, engine.batch_layout, micro_batch_size=MICRO_BATCH_SIZE)


def calls(engine: MegatronEngine, samples: list[TrainingSample], parts: dict[str, bool]) -> dict[str, Callable]:
    """What must be refused; none of these comes as far as its arguments."""
    nowhere = Path("nowhere")
    training = {
        "forward_backward": lambda: engine.forward_backward(None, None),
        "optimizer_step": engine.optimizer_step,
        "save": lambda: engine.save(nowhere, {}),
        "load": lambda: engine.load(nowhere),
    }
    evaluation = {
        "compute_log_probs": lambda: engine.compute_log_probs(as_batch(engine, samples)),
        "generate": lambda: engine.generate(PROMPTS, SEEDS, SAMPLING),
        "export_hf_weights": engine.export_hf_weights,
    }
    return training | (evaluation if parts["model"] else {})


def is_refused(call: Callable) -> bool:
    try:
        call()
    except AssertionError as error:
        return "is offloaded" in str(error)
    return False


def raise_inside(engine: MegatronEngine) -> dict[str, Any]:
    """What is left of the state where the body raises: the error, and whether each tensor is as before."""
    kept = [t for name, group in tensors(engine).items() if name != "gradients" for t in group]
    before, error = [t.clone() for t in kept], None
    try:
        with engine.offloaded(optimizer=True, model=True):
            raise KeyError("the other engine failed")
    except KeyError as caught:
        error = repr(caught)
    return {"error": error, "is_back": all(torch.equal(t, b) for t, b in zip(kept, before, strict=True))}


def step_on_lost_gradients(engine: MegatronEngine) -> str:
    """What an optimizer step says right after offloading."""
    with engine.offloaded(optimizer=True, model=False):
        pass
    try:
        engine.optimizer_step()
    except AssertionError as error:
        return str(error)
    return "stepped"


def tensors(engine: MegatronEngine) -> dict[str, list[Tensor]]:
    """Everything that is claimed, as Megatron-Core's DDP, its optimizers and torch's Adam have it."""
    buffers = [buffer for chunk in engine._chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    inner = engine._optimizer.chained_optimizers
    parameters = [parameter for chunk in engine._chunks for parameter in chunk.parameters()]
    of_model = {storage._cdata for storage in storages(parameters)}
    masters = [p for optimizer in inner for p in optimizer.get_parameters()]
    return {
        "parameters": [*parameters, *(buffer.param_data for buffer in buffers if buffer.param_data is not None)],
        "gradients": [*(buffer.grad_data for buffer in buffers), *(parameter.main_grad for parameter in parameters)],
        "masters": [p for p in masters if p.untyped_storage()._cdata not in of_model],
        "moments": [s[name] for o in inner for s in o.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")],
    }


def storages(group: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    return list({storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in group)}.values())


def held(engine: MegatronEngine) -> dict[str, Any]:
    """Bytes of storages by what they are for, and the size of each."""
    by_use = {name: [storage.nbytes() for storage in storages(group)] for name, group in tensors(engine).items()}
    return {name: sum(sizes) for name, sizes in by_use.items()} | {"storages": [n for s in by_use.values() for n in s]}


def describe_buffers(engine: MegatronEngine) -> list[dict[str, Any]]:
    """Of each DDP buffer the sizes of its parameters, in Megatron-Core's order, and its data-parallel place."""
    return [
        {
            "sizes": [parameter.numel() for parameter in buffer.params],
            "dp_size": buffer.data_parallel_group.size(),
            "dp_rank": buffer.data_parallel_group.rank(),
        }
        for chunk in engine._chunks
        for buffer in chunk.buffers + chunk.expert_parallel_buffers
    ]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
