"""Rules of the engines that draw rollouts."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from chord_megatron.config import Config, RolloutConfig
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import ModelArchitecture


def check_rollouts(config: Config, arch: ModelArchitecture, world_size: int) -> None:
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
