"""The batch arithmetic and the parallel layout of a run, and every rule that spans several fields.

`make_plan` looks at numbers only and loads nothing, so that mistakes show before any process starts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from chord_megatron.algorithm.mu import mu_schedule
from chord_megatron.config import Config, ParallelConfig, RolloutConfig
from chord_megatron.convert.architecture import MixtureOfExperts, ModelArchitecture
from chord_megatron.types import UserError


@dataclass(frozen=True)
class Plan:
    """What one optimizer step consists of."""

    world_size: int
    data_parallel_size: int
    prompts_per_step: int
    completions_per_step: int
    expert_rows_per_step: int  # while mu > 0
    micro_batches_per_step: int  # on each data-parallel rank, while both streams run
    steps_per_rollout: int  # optimizer steps that share one generation batch; 1 = on-policy


def make_plan(config: Config, arch: ModelArchitecture, world_size: int) -> Plan:
    """Check the configuration against the model and the number of processes. Raises UserError."""
    data_parallel_size = _check_layout(config, arch, world_size)
    _check_batches(config, data_parallel_size)
    _check_streams(config)
    _check_rollouts(config, arch, world_size)
    _check_lengths(config, arch)
    steps_per_rollout = config.grpo.steps_per_generation * config.grpo.num_iterations
    _check_steps(config, steps_per_rollout)
    train, num_generations = config.train, config.rollout.num_generations
    expert_rows = _expert_rows(config, data_parallel_size)
    rows_per_rank = -(-(train.global_batch_size + expert_rows) // data_parallel_size)
    # The interleaved schedule runs micro-batches in groups of the pipeline size.
    interleaved = config.parallel.virtual_pipeline_model_parallel_size is not None
    multiple = config.parallel.pipeline_model_parallel_size if interleaved else 1
    micro_batches = -(-rows_per_rank // (train.micro_batch_size * multiple)) * multiple
    return Plan(
        world_size=world_size,
        data_parallel_size=data_parallel_size,
        prompts_per_step=train.global_batch_size // num_generations,
        completions_per_step=train.global_batch_size,
        expert_rows_per_step=expert_rows,
        micro_batches_per_step=micro_batches,
        steps_per_rollout=steps_per_rollout,
    )


def mu_at(config: Config, step: int) -> float:
    """mu of the configured schedule at a 0-based optimizer step."""
    chord = config.chord
    return mu_schedule(
        step,
        peak=chord.chord_mu_peak,
        valley=chord.chord_mu_valley,
        warmup_steps=chord.chord_mu_warmup_steps,
        decay_steps=chord.chord_mu_decay_steps,
    )


def _check_layout(config: Config, arch: ModelArchitecture, world_size: int) -> int:
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    _check_tensor_parallel(parallel, arch)
    _check_pipeline_parallel(parallel, arch)
    if world_size % (tp * pp):
        raise UserError(
            f"{world_size} process{'es' * (world_size > 1)} cannot hold tensor x pipeline = {tp} x {pp} = {tp * pp} "
            f"ranks a model; start a multiple of {tp * pp} processes (--nproc-per-node, --nnodes)"
        )
    _check_expert_parallel(parallel, arch, ranks_per_stage=world_size // pp)
    return world_size // (tp * pp)


def _check_tensor_parallel(parallel: ParallelConfig, arch: ModelArchitecture) -> None:
    tp, moe = parallel.tensor_model_parallel_size, arch.moe
    # Experts are never split, and neither are the down projections of latent attention.
    split = [("attention heads", arch.num_attention_heads)]
    if arch.mla is None:
        split.append(("query groups (key/value heads)", arch.num_query_groups))
    if moe is None or moe.dense_layers:
        split.append(("MLP columns", arch.ffn_hidden_size))
    if moe is not None and moe.shared_ffn_hidden_size is not None:
        split.append(("columns of shared experts", moe.shared_ffn_hidden_size))
    for what, size in split:
        if size % tp:
            raise UserError(
                f"parallel.tensor_model_parallel_size={tp} does not divide the model's {size} {what}; "
                f"choose a divisor of {size}"
            )
    if tp > 1 and not parallel.sequence_parallel and (moe is not None or arch.mla is not None):
        what = "experts" if moe is not None else "latent attention"
        raise UserError(
            f"parallel.tensor_model_parallel_size={tp} of a model with {what} needs parallel.sequence_parallel=true; "
            "set it"
        )


def _check_pipeline_parallel(parallel: ParallelConfig, arch: ModelArchitecture) -> None:
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if vpp is not None and pp == 1:
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size={vpp} needs parallel.pipeline_model_parallel_size > 1; "
            "remove it or raise the pipeline size"
        )
    stages = pp * (vpp or 1)
    if arch.num_layers % stages:
        key = "parallel.pipeline_model_parallel_size" + (" x virtual_pipeline_model_parallel_size" if vpp else "")
        raise UserError(
            f"{key}={stages} does not divide the model's {arch.num_layers} layers; "
            f"choose a divisor of {arch.num_layers}"
        )


def _check_expert_parallel(parallel: ParallelConfig, arch: ModelArchitecture, *, ranks_per_stage: int) -> None:
    ep, moe = parallel.expert_model_parallel_size, arch.moe
    key = f"parallel.expert_model_parallel_size={ep}"
    if moe is None:
        if ep > 1:
            raise UserError(f"{key}, but the model has no experts; set it to 1")
        return
    _check_router(moe)
    if moe.num_experts % ep:
        raise UserError(
            f"{key} does not divide the model's {moe.num_experts} experts; choose a divisor of {moe.num_experts}"
        )
    if ranks_per_stage % ep:
        raise UserError(
            f"{key} does not divide the tensor x data = {ranks_per_stage} ranks of a pipeline stage; "
            f"choose a divisor of {ranks_per_stage} or start more processes"
        )


def _check_router(moe: MixtureOfExperts) -> None:
    """Refuse what Megatron-Core's router computes otherwise than transformers (moe_utils.py:715)."""
    if moe.experts_per_token == 1 and moe.normalize_top_k:
        raise UserError("a model that normalizes the weight of a single expert a token cannot be trained; use another")


def _check_batches(config: Config, data_parallel_size: int) -> None:
    train, num_generations = config.train, config.rollout.num_generations
    if train.global_batch_size % num_generations:
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} completions is not a multiple of "
            f"rollout.num_generations={num_generations}; every prompt needs its whole group"
        )
    share = train.micro_batch_size * data_parallel_size
    if train.global_batch_size % share:
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size x "
            f"data-parallel size = {train.micro_batch_size} x {data_parallel_size} = {share}"
        )


def _check_streams(config: Config) -> None:
    chord, rollout, train = config.chord, config.rollout, config.train
    constant_from = chord.chord_mu_warmup_steps + chord.chord_mu_decay_steps
    learns_from_experts = any(mu_at(config, step) > 0 for step in range(min(train.train_iters, constant_from + 1)))
    if learns_from_experts and chord.chord_sft_dataset is None:
        raise UserError(
            "chord.chord_sft_dataset is required while mu > 0; "
            "for GRPO alone set chord.chord_mu_peak=0 and chord.chord_mu_valley=0"
        )
    sizes = (chord.chord_sft_global_batch_size, chord.chord_sft_per_device_train_batch_size)
    if learns_from_experts and sum(size is not None for size in sizes) != 1:
        raise UserError(
            "set exactly one of chord.chord_sft_global_batch_size and chord.chord_sft_per_device_train_batch_size"
        )
    is_replay = rollout.engine == "replay"
    if is_replay != (rollout.replay_from is not None):
        raise UserError("rollout.engine=replay and rollout.replay_from go together; set both or neither")
    if (
        rollout.record_to
        and rollout.replay_from
        and Path(rollout.record_to).resolve() == Path(rollout.replay_from).resolve()
    ):
        raise UserError("rollout.record_to and rollout.replay_from name one file; record into another one")
    if train.eval_steps is not None and config.data.eval_dataset is None:
        raise UserError("train.eval_steps needs data.eval_dataset; set it, or train.eval_steps=null for no evaluation")


def _check_rollouts(config: Config, arch: ModelArchitecture, world_size: int) -> None:
    """That each vllm_* key has the engine and the mode that it is for."""
    rollout, defaults = config.rollout, RolloutConfig()
    if (rollout.engine == "vllm") != (rollout.vllm_mode is not None):
        raise UserError(
            "rollout.engine=vllm and rollout.vllm_mode (colocate or server) go together; set both or neither"
        )
    for mode, keys in _KEYS_OF_MODE.items():
        for key in keys:
            if getattr(rollout, key) != getattr(defaults, key) and rollout.vllm_mode != mode:
                raise UserError(f"rollout.{key} is for rollout.engine=vllm with rollout.vllm_mode={mode}; remove it")
    if rollout.vllm_mode == "server" and not rollout.vllm_servers:
        raise UserError(
            "rollout.vllm_mode=server needs rollout.vllm_servers, such as ['http://127.0.0.1:8000']; start them with "
            "`chord-megatron serve`"
        )
    for url in rollout.vllm_servers or ():
        if not re.fullmatch(r"https?://[^/\s]+/?", url):
            raise UserError(f"rollout.vllm_servers: {url!r} must look like http://host:port")
        address = rollout.weight_transfer_address
        if rollout.weight_transfer == "broadcast" and _is_loopback(address) > _is_loopback(str(urlsplit(url).hostname)):
            raise UserError(
                f"rollout.weight_transfer_address={address} cannot be reached from the machine of {url}; set it to an "
                "address of rank 0's machine"
            )
    tp = rollout.vllm_tensor_parallel_size
    if world_size % tp or arch.num_attention_heads % tp:
        raise UserError(
            f"rollout.vllm_tensor_parallel_size={tp} must divide the {world_size} processes and the model's "
            f"{arch.num_attention_heads} attention heads; choose another"
        )
    if rollout.max_staleness and config.grpo.steps_per_generation * config.grpo.num_iterations > 1:
        raise UserError(
            "rollout.max_staleness=1 draws one batch ahead for each step; set grpo.steps_per_generation and "
            "grpo.num_iterations to 1"
        )


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.")


_KEYS_OF_MODE = {
    "colocate": (
        "vllm_tensor_parallel_size",
        "vllm_gpu_memory_utilization",
        "vllm_enforce_eager",
        "sleep_level",
        "offload_optimizer",
        "offload_model",
    ),
    "server": (
        "vllm_servers",
        "vllm_server_timeout",
        "weight_transfer",
        "weight_transfer_dir",
        "weight_transfer_address",
        "max_staleness",
    ),
}


def _check_lengths(config: Config, arch: ModelArchitecture) -> None:
    longest = config.data.max_prompt_length + config.rollout.max_completion_length
    if longest > arch.max_position_embeddings:
        raise UserError(
            f"data.max_prompt_length + rollout.max_completion_length = {longest} tokens, but the model reads "
            f"{arch.max_position_embeddings}; lower one of them"
        )
    if config.chord.chord_sft_dataset is not None and config.chord.chord_sft_max_length > arch.max_position_embeddings:
        raise UserError(
            f"chord.chord_sft_max_length={config.chord.chord_sft_max_length}, but the model reads "
            f"{arch.max_position_embeddings} tokens; lower it"
        )


def _check_steps(config: Config, steps_per_rollout: int) -> None:
    train, optimizer = config.train, config.optimizer
    for name, value in (("train_iters", train.train_iters), ("save_steps", train.save_steps)):
        if value is not None and value % steps_per_rollout:
            raise UserError(
                f"train.{name}={value} is not a multiple of grpo.steps_per_generation x num_iterations = "
                f"{steps_per_rollout}; a generation batch is not kept in checkpoints"
            )
    if optimizer.min_lr > optimizer.lr:
        raise UserError(f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}")
    if optimizer.lr_warmup_iters >= train.train_iters:
        raise UserError(
            f"optimizer.lr_warmup_iters={optimizer.lr_warmup_iters} must be below train.train_iters={train.train_iters}"
        )


def _expert_rows(config: Config, data_parallel_size: int) -> int:
    """Expert rows of one optimizer step; per device as in ms-swift: rows x DP x gradient accumulation steps."""
    chord, train = config.chord, config.train
    if chord.chord_sft_per_device_train_batch_size is not None:
        accumulation_steps = train.global_batch_size // (train.micro_batch_size * data_parallel_size)
        return chord.chord_sft_per_device_train_batch_size * data_parallel_size * accumulation_steps
    return chord.chord_sft_global_batch_size or 0
