"""One part of tools/gpu_suite.py, in a process of its own: each measurement is written as soon as it is there."""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_suite_machine import Measurements, Setting, peaks
from gpu_suite_models import mfu, step_flops, write_run

if TYPE_CHECKING:
    from chord_megatron.backend.engine import MegatronEngine


# --- training -------------------------------------------------------------------------------------------------------


def train(setting: Setting, name: str) -> Measurements:
    """Steps of a run as `python -m chord_megatron.train` makes them, but without a checkpoint at the end."""
    from chord_megatron.backend.groups import shut_down_distributed
    from chord_megatron.config import load_config
    from chord_megatron.planning.memory import model_state
    from chord_megatron.planning.plan import make_plan
    from chord_megatron.training.run import Run

    class Steps(Run):
        def _save(self, told: int) -> None:
            """Nothing: tests/gpu saves, and two billion parameters are 28 GB."""
            self.run_dir.checkpoint(0).parent.mkdir(exist_ok=True)  # where a run notes that it is finished

    shape, sizes = setting.shape(name), setting.sizes
    config = load_config(write_run(setting.work / f"run_{name}", setting.model(name), sizes))
    endless = config.rollout.model_copy(update={"stop_token_ids": []})  # a run may not; here all lengths are the same
    config = config.model_copy(update={"rollout": endless})
    flops = step_flops(shape, sizes.lengths, sizes.loss_tokens)
    yield "shape", asdict(shape)
    yield "sizes", {**asdict(sizes), "tokens": sum(sizes.lengths), "loss_tokens": sizes.loss_tokens}
    yield "needed_flops", flops
    run = Steps(config)
    yield "acceleration", run.engine.acceleration_note
    state = model_state(config, run.engine.arch, make_plan(config, run.engine.arch, 1))
    try:
        run.train()
    finally:
        metrics = run.run_dir.path / "metrics.jsonl"
        steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        kept = ("step", "loss", "grad_norm", "reward_std", "zero_std_fraction", "log_prob_diff_mean")
        yield "steps", [{k: v for k, v in step.items() if k in kept or k.startswith("time_")} for step in steps]
    assert all(step["num_rollout_tokens"] + step["num_expert_tokens"] == sizes.loss_tokens for step in steps)
    keys = [key for key, value in steps[0].items() if key.startswith("time_") and value is not None]
    times = {key: statistics.median(step[key] for step in steps[sizes.warm_up :]) for key in keys}
    yield "median_seconds", times
    yield "shares_of_step", {key: value / times["time_step"] for key, value in times.items()}
    matmul, sheet = setting.peaks.get("matmul", {}), setting.peaks.get("environment", {}).get("data_sheet_tflops")
    for phase in ("time_train", "time_step"):
        yield f"mfu_{phase}", mfu(flops["sum"], times[phase], matmul.get("tflops_per_second"), sheet)
    yield "tokens_per_second_train", sum(sizes.lengths) / times["time_train"]
    peak = steps[-1]["peak_memory_bytes"]
    memory = {"peak_bytes": peak, "weights_gradients_optimizer_bytes": state.on_device}
    if not setting.tiny:
        memory["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    yield "memory", memory
    shut_down_distributed()


def make_engine(setting: Setting) -> MegatronEngine:
    """Of the 0.5B shape, in a world of one."""
    from chord_megatron.backend.engine import MegatronEngine
    from chord_megatron.backend.groups import initialize_distributed
    from chord_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig

    model = ModelConfig(path=str(setting.model("0.5b")), dtype=setting.sizes.dtype)
    groups = initialize_distributed(ParallelConfig(), seed=0)
    return MegatronEngine(model, ParallelConfig(), OptimizerConfig(), groups, train_iters=4, keep_reference=False)


# --- rollouts and weights -------------------------------------------------------------------------------------------


def generate(setting: Setting) -> Measurements:
    """Embedded generation; the floor of a decoding step is reading the weights once at the speed of a copy."""
    engine, sizes = make_engine(setting), setting.sizes
    shape = setting.shape("0.5b")
    nbytes = (shape.layer_weights + shape.head_weights) * getattr(torch, sizes.dtype).itemsize
    rate = setting.peaks.get("copy", {}).get("bytes_per_second_read_and_written")
    floor = nbytes / rate if rate else None
    yield "floor_seconds_per_token", floor
    for batch in sizes.generation_batches:
        prompts = [[2 + (row + place) % 500 for place in range(sizes.prompt_tokens)] for row in range(batch)]

        draw = partial(_draw, engine, prompts)
        draw(2)
        first = setting.seconds(partial(draw, 1))
        whole = setting.seconds(partial(draw, sizes.completion_tokens))
        step = (whole - first) / (sizes.completion_tokens - 1)
        yield (
            f"batch_{batch}",
            {
                "prompt_tokens": sizes.prompt_tokens,
                "new_tokens": sizes.completion_tokens,
                "seconds": whole,
                "tokens_per_second": batch * sizes.completion_tokens / whole,
                "prefill_seconds": first,
                "seconds_per_token": step,
                "over_floor": step / floor if floor else None,
            },
        )


def _draw(engine: MegatronEngine, prompts: list[list[int]], tokens: int) -> None:
    from chord_megatron.types import SamplingParams

    params = SamplingParams(max_completion_length=tokens)
    completions = engine.generate(prompts, [(0, row) for row in range(len(prompts))], params)
    assert all(len(completion) == tokens for completion, _ in completions)


def offload(setting: Setting) -> Measurements:
    """Weights, optimizer state and gradients away and back, three times; the first time also gets pinned memory."""
    from chord_megatron.algorithm.objective import Objective, chord_loss
    from chord_megatron.algorithm.policy_losses import clipped_policy_loss
    from chord_megatron.batching.packing import build_global_batch
    from chord_megatron.types import TrainingSample

    engine = make_engine(setting)
    sample = TrainingSample(torch.arange(2, 34), torch.ones(32, dtype=torch.bool), is_expert=True, temperature=1.0)
    batch = build_global_batch([sample], engine.batch_layout, micro_batch_size=1)
    objective = Objective(partial(clipped_policy_loss, epsilon=0.2, epsilon_high=0.2))
    engine.forward_backward(batch, partial(chord_loss, objective=objective, mu=1.0))
    assert engine.optimizer_step().stepped
    shape = setting.shape("0.5b")
    weights = shape.layer_weights + shape.head_weights
    yield "expected", {"freed_bytes": 18 * weights, "moved_bytes": 14 * weights}  # in bfloat16; norms and biases apart
    rates = setting.peaks.get("pinned_host", {})
    copies = {f"seconds_of_a_{key.split('_bytes')[0]}_copy": 14 * weights / rate for key, rate in rates.items()}
    yield "of_copies", copies
    for turn in range(3):
        before = held_bytes(setting)
        context = engine.offloaded(optimizer=True, model=True)
        away = setting.seconds(context.__enter__)
        freed = {name: value - held_bytes(setting)[name] for name, value in before.items()}
        back = setting.seconds(partial(context.__exit__, None, None, None))
        yield f"turn_{turn}", {"freed_bytes": freed, "seconds_away": away, "seconds_back": back}
    engine.forward_backward(batch, partial(chord_loss, objective=objective, mu=1.0))
    yield "steps_after", engine.optimizer_step().stepped


def held_bytes(setting: Setting) -> dict[str, int]:
    """Of device memory; on a CPU nothing is measured."""
    if setting.tiny:
        return {}
    torch.cuda.empty_cache()
    return {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}


def nccl(setting: Setting) -> Measurements:
    """A world of one: the library starts, reduces, and carries the weights of the 0.5B shape to itself."""
    import torch.distributed as dist

    from chord_megatron.backend.groups import initialize_distributed
    from chord_megatron.config import ParallelConfig
    from chord_megatron.rollout.updates.broadcast import BroadcastGroup, pack, unpack
    from chord_megatron.rollout.updates.manifest import buckets, checksum

    yield "start_seconds", setting.seconds(partial(initialize_distributed, ParallelConfig(), seed=0))
    yield "backend", dist.get_backend()
    numbers = torch.ones(2**10 if setting.tiny else 2**26, device=setting.device)
    reduce = partial(dist.all_reduce, numbers)
    first = setting.seconds(reduce)  # starts the communicator
    yield "all_reduce", {"bytes": numbers.nbytes, "first_seconds": first, "seconds": setting.median_seconds(reduce)}
    assert bool((numbers == 1).all()), "a sum over one process changed"
    engine = make_engine(setting)
    listener = socket.create_server(("127.0.0.1", 0))
    port, device = listener.getsockname()[1], setting.device
    group = BroadcastGroup("127.0.0.1", port, rank=0, world_size=1, device=device, timeout=120.0, listener=listener)
    start = partial(group.broadcast, torch.zeros(1, dtype=torch.uint8, device=device))
    yield "group_start_seconds", setting.seconds(start)
    parts = {"export": 0.0, "pack": 0.0, "broadcast": 0.0}
    nbytes = 0
    mark = time.perf_counter()

    def charge(part: str) -> None:
        nonlocal mark
        setting.synchronize()
        parts[part] += time.perf_counter() - mark
        mark = time.perf_counter()

    for bucket in buckets(engine.export_hf_weights(), 512 * 10**6):
        charge("export")
        message, headers = pack(bucket, device)
        charge("pack")
        group.broadcast(message)
        charge("broadcast")
        nbytes += len(message)
        arrived = unpack(headers, Loopback(device, message))  # type: ignore[arg-type]
        sums = {header["name"]: header["checksum"] for header in headers}
        assert all(checksum(tensor) == sums[name] for name, tensor in arrived), "a tensor changed on its way"
        mark = time.perf_counter()
    yield "weights", {"bytes": nbytes, "seconds": parts, "unchanged": True}


@dataclass(frozen=True)
class Loopback:
    """Stands for the receiver's BroadcastGroup, which one process cannot have beside the sender's."""

    device: torch.device
    message: torch.Tensor

    def broadcast(self, message: torch.Tensor) -> None:
        message.copy_(self.message)


PARTS: dict[str, Callable[[Setting], Measurements]] = {
    "peaks": peaks,
    "train_0.5b": lambda setting: train(setting, "0.5b"),
    "train_7b": lambda setting: train(setting, "7b"),
    "generate": generate,
    "offload": offload,
    "nccl": nccl,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--peaks", type=Path, required=True, help="the JSON of the part of that name")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("no NVIDIA GPU here; --tiny shows on a CPU that the parts run")
    known = json.loads(arguments.peaks.read_text(encoding="utf-8"))["result"] if arguments.peaks.exists() else None
    found: dict[str, Any] = {}
    for name, value in PARTS[arguments.part](Setting(arguments.work, arguments.tiny, known or {})):
        found[name] = value
        temporary = arguments.result.with_suffix(".tmp")
        temporary.write_text(json.dumps(found), encoding="utf-8")
        temporary.replace(arguments.result)
        print(f"{name}: {json.dumps(value)[:400]}", flush=True)


if __name__ == "__main__":
    main()
