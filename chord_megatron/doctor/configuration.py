"""Checks of what a configuration needs from this machine."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from chord_megatron.checkpoints import reader
from chord_megatron.config import Config
from chord_megatron.doctor.check import Check
from chord_megatron.doctor.machine import Gpu, available_memory
from chord_megatron.planning.memory import checkpoint_bytes, export_bytes
from chord_megatron.planning.rank_memory import RankMemory
from chord_megatron.planning.steps import is_counted
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import counted, size
from chord_megatron.tracking.run_dir import RunDir
from chord_megatron.weights.architecture import ModelArchitecture

_BFLOAT16_CAPABILITY = (8, 0)  # from Ampere on
_LESS_MEMORY = (
    "raise parallel.tensor_model_parallel_size or pipeline_model_parallel_size, share the optimizer's state among "
    "more data-parallel ranks (optimizer.use_distributed_optimizer), or take a smaller model"
)
_SHORTER_ROWS = (
    "bound the rows (data.max_prompt_length, rollout.max_completion_length, chord.chord_sft_max_length), lower "
    "train.micro_batch_size or rollout.max_batch_size, or set model.recompute"
)
_MAKE_ROOM = "rollout.sleep_level, offload_optimizer or offload_model"


def check_weights(model_dir: Path, arch: ModelArchitecture) -> Check:
    """Whether the model's files are there and complete, by their headers; of a converted checkpoint too."""
    try:
        reader.check_weights(model_dir, arch)
    except UserError as error:
        return Check("weights", None, "wrong", str(error), is_blocking=True)
    return Check("weights", str(model_dir), "ok", "every tensor of the model is there")


def check_tokenizer(config: Config, arch: ModelArchitecture) -> Check:
    """Whether it loads, and whether the model knows its end tokens; the data are not read."""
    name = "tokenizer"
    try:
        # Only here: the doctor is to say what is wrong with transformers where it cannot be imported.
        from chord_megatron.data.tokenizer import load_tokenizer
        from chord_megatron.data.vocabulary import check_vocabulary

        tokenizer = load_tokenizer(Path(config.model.path), trust_remote_code=config.model.trust_remote_code)
        check_vocabulary(config, tokenizer, arch.vocab_size)
    except (UserError, ImportError) as error:
        return Check(name, None, "wrong", str(error), is_blocking=True)
    found = f"{len(tokenizer)} tokens"
    if len(tokenizer) > arch.vocab_size:
        meaning = f"the model has no row for those from {arch.vocab_size} on: a run whose data hold one is refused"
        remedy = "take the model's own tokenizer, or resize the model by transformers' resize_token_embeddings"
        return Check(name, found, "wrong", meaning, remedy)
    return Check(name, found, "ok", f"its end tokens are among the {arch.vocab_size} rows of the model")


def check_processes(gpus: Sequence[Gpu], nproc_per_node: int) -> Check:
    found = f"{nproc_per_node} on this node"
    if gpus and nproc_per_node > len(gpus):
        return Check(
            "processes",
            found,
            "wrong",
            f"each needs a GPU of its own, and there are {len(gpus)}",
            f"start --nproc-per-node {len(gpus)}, or take more nodes",
            is_blocking=True,
        )
    return Check("processes", found, "ok", "a GPU each" if gpus else "on the CPU")


def check_dtype(gpus: Sequence[Gpu], dtype: str) -> Check:
    too_old = [gpu.name for gpu in gpus if gpu.capability < _BFLOAT16_CAPABILITY]
    if dtype == "bfloat16" and too_old:
        meaning, remedy = (
            f"{too_old[0]} cannot compute in bfloat16",
            "set model.dtype=float32, or take an Ampere or newer",
        )
        return Check("model.dtype", dtype, "wrong", meaning, remedy, is_blocking=True)
    slow = dtype == "bfloat16" and not gpus
    return Check("model.dtype", dtype, "ok", "slow on a CPU; model.dtype=float32 is faster there" if slow else "used")


def check_gpu_memory(memory: RankMemory, gpus: Sequence[Gpu], nproc_per_node: int) -> Check:
    """What the fullest rank holds, against the GPU with the least free memory that a rank would get.

    It cannot run where its state does not fit; where only the longest rows do not, it may.
    """
    gpu = fullest_gpu(gpus, nproc_per_node)
    found = f"{size(gpu.free_bytes)} of {size(gpu.total_bytes)} free"
    what, remedy = memory.state_in_words, _LESS_MEMORY
    if memory.sampler:
        what = f"{size(memory.always)} at once: {size(memory.sampler)} of vLLM, and {what}"
        remedy = f"lower rollout.vllm_gpu_memory_utilization, set {_MAKE_ROOM}, or {_LESS_MEMORY}"
    if memory.always > gpu.free_bytes:
        remedy = "end what else runs on it" if memory.always <= gpu.total_bytes else remedy
        return Check("GPU memory", found, "wrong", f"{found}, but needed are {what}", remedy, is_blocking=True)
    return _with_longest_rows("GPU memory", found, gpu.free_bytes, memory.peak, memory, what)


def fullest_gpu(gpus: Sequence[Gpu], nproc_per_node: int) -> Gpu:
    """Of those that ranks get, the one with the least free memory."""
    return min(gpus[:nproc_per_node], key=lambda gpu: gpu.free_bytes)


def check_host_memory(
    memory: RankMemory, gpus: Sequence[Gpu], nproc_per_node: int, ranks_of_stage: int | None = None
) -> Check:
    """What all processes of this node hold on the host: everything without GPUs, else what a GPU need not hold."""
    state, name = memory.state, "host memory"
    on_host = state.reference + state.aside + state.offloaded
    saving = state.saving * -(-nproc_per_node // (ranks_of_stage or nproc_per_node))
    needed = nproc_per_node * (on_host + (0 if gpus else state.on_device)) + saving
    free = available_memory()
    found = f"{size(free)} free"
    parts = [] if gpus else [memory.state_in_words]
    parts += [f"{size(state.reference)} reference a process (grpo.beta > 0)"] if state.reference else []
    parts += [f"{size(state.aside)} a process while trainer and vLLM make room ({_MAKE_ROOM})"] if state.aside else []
    parts += [f"{size(state.offloaded)} optimizer a process"] if state.offloaded else []
    parts += [f"{size(saving)} of checkpoints that are being written (train.async_save)"] if saving else []
    what = f"{size(needed)} for {counted(nproc_per_node, 'process', 'processes')}: {', '.join(parts)}"
    if needed > free:
        remedy = f"start fewer processes here, or {_LESS_MEMORY}"
        return Check(name, found, "wrong", f"{found}, but needed are {what}", remedy, is_blocking=True)
    if gpus:
        return Check(name, found, "ok", f"needed: {what}" if parts else "for data and libraries")
    return _with_longest_rows(name, found, free, nproc_per_node * (on_host + memory.peak) + saving, memory, what)


def _with_longest_rows(name: str, found: str, free: int, needed: int, memory: RankMemory, what: str) -> Check:
    """Of a state that fits: whether a step of the longest rows does."""
    meaning = f"needed: {what}; with the longest rows {memory.step_in_words}"
    if needed <= free:
        return Check(name, found, "ok", meaning)
    return Check(name, found, "wrong", f"{meaning}, which is too much", _SHORTER_ROWS)


def check_output_dir(output_dir: Path) -> Check:
    """Whether a run can make its directory and files there; leaves nothing behind."""
    found = _nearest_existing(output_dir)
    try:
        with tempfile.TemporaryFile(dir=found):
            pass
    except OSError as error:
        meaning = f"cannot write to {found} ({error.strerror})"
        remedy = "name another folder in train.output_dir, or ask for the right to write"
        return Check("train.output_dir", str(output_dir), "wrong", meaning, remedy, is_blocking=True)
    return Check("train.output_dir", str(output_dir), "ok", "can be written")


def check_disk(config: Config, arch: ModelArchitecture) -> Check:
    """Room for every checkpoint and export that the run will add and keep, one more where old ones are removed."""
    output_dir = Path(config.train.output_dir)
    free = shutil.disk_usage(_nearest_existing(output_dir)).free
    copies = _copies_to_write(config, already=len(RunDir(output_dir).saved_steps()))
    checkpoint, export = checkpoint_bytes(config, arch), export_bytes(config, arch)
    needed = copies * (checkpoint + export)
    what = f"{size(needed)} = {copies} x ({size(checkpoint)} checkpoint + {size(export)} export)"
    found = f"{size(free)} free"
    if needed <= free:
        return Check("disk", found, "ok", f"needed: {what}")
    remedy = "free some space, or name another disk in train.output_dir"
    if config.train.save_total_limit is None and copies > 1:
        remedy += ", or set train.save_total_limit (now null: all are kept)"
    return Check("disk", found, "wrong", f"{found}, but needed are {what}", remedy, is_blocking=True)


def _copies_to_write(config: Config, *, already: int) -> int:
    """How many more copies than the `already` saved ones there will be at once."""
    train = config.train
    saves = math.ceil(train.train_iters / train.save_steps) if train.save_steps else 1
    if not is_counted(config):
        saves = 2  # at the least: how many epochs have, the data says
    # The oldest goes when the newest is complete.
    at_once = saves if train.save_total_limit is None else min(saves, train.save_total_limit + 1)
    return max(1, at_once - already)


def _nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
