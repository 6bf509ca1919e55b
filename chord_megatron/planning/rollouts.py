"""Rules of the engines that draw rollouts."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from chord_megatron.config import Config, GRPOConfig, RolloutConfig
from chord_megatron.system.errors import UserError
from chord_megatron.system.listening import is_loopback
from chord_megatron.system.sentences import shown
from chord_megatron.types import foreign_tokens
from chord_megatron.weights.architecture import ModelArchitecture


def check_rollouts(config: Config, arch: ModelArchitecture, world_size: int) -> None:
    """That each vllm_* key has the engine and the mode that it is for, and the sampler takes the numbers."""
    rollout, defaults = config.rollout, RolloutConfig()
    _check_sampling(config, arch)
    _check_router_replay(config, arch)
    if (rollout.engine == "vllm") != (rollout.vllm_mode is not None):
        raise UserError(
            "rollout.engine=vllm and rollout.vllm_mode (colocate or server) go together; set both or neither"
        )
    for mode, keys in KEYS_OF_MODE.items():
        for key in keys:
            if getattr(rollout, key) != getattr(defaults, key) and rollout.vllm_mode != mode:
                raise UserError(f"rollout.{key} is for rollout.engine=vllm with rollout.vllm_mode={mode}; remove it")
    if rollout.vllm_mode == "server" and not rollout.vllm_servers:
        raise UserError(
            "rollout.vllm_mode=server needs rollout.vllm_servers, such as ['http://127.0.0.1:8000']; start them with "
            "`chord-megatron serve`"
        )
    _check_addresses(rollout)
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


def _check_sampling(config: Config, arch: ModelArchitecture) -> None:
    if foreign := foreign_tokens(config.rollout.stop_token_ids or (), arch.vocab_size):
        raise UserError(
            f"rollout.stop_token_ids: {foreign[0]} is not one of the model's {arch.vocab_size} tokens; name tokens "
            f"below {arch.vocab_size}, or null for the tokenizer's end tokens"
        )
    temperatures = {
        "rollout.temperature": config.rollout.temperature,
        "train.eval_temperature": config.train.eval_temperature,
    }
    for key, value in temperatures.items():
        if config.rollout.engine == "vllm" and value > _HOTTEST_OF_VLLM:
            raise UserError(f"{key}={value}, but vLLM samples at {_HOTTEST_OF_VLLM} at most; lower it")


def _check_router_replay(config: Config, arch: ModelArchitecture) -> None:
    source, engine = config.rollout.router_replay, config.rollout.engine
    if source is None:
        return
    if arch.moe is None:
        raise UserError(f"rollout.router_replay={source} is for models with experts, and this one has none; remove it")
    if config.model.transformer_config.get("moe_router_fusion"):
        raise UserError(
            f"rollout.router_replay={source} needs routers that can be told what to choose, and fused ones cannot; "
            "remove it, or model.transformer_config.moe_router_fusion"
        )
    if source == "sampler" and engine == "vllm":
        raise UserError(
            "rollout.router_replay=sampler needs an engine that says which experts served a token, and with vLLM this "
            "release does not ask; set it to trainer, or rollout.engine=megatron"
        )
    if source == "trainer" and not _are_scored_again(config.grpo):
        raise UserError(
            "rollout.router_replay=trainer changes nothing where an update is the first to score its completions; "
            "remove it, or set grpo.num_iterations above 1"
        )


def _are_scored_again(grpo: GRPOConfig) -> bool:
    """Whether some completions are scored before an update whose weights have moved since."""
    are_scored_before = grpo.old_log_probs == "trainer" or grpo.top_entropy_quantile < 1
    return grpo.num_iterations > 1 or (grpo.steps_per_generation > 1 and are_scored_before)


def _check_addresses(rollout: RolloutConfig) -> None:
    urls = [url.rstrip("/") for url in rollout.vllm_servers or ()]
    for url in urls:
        if not _is_server(url):
            raise UserError(f"rollout.vllm_servers: {shown(url)} must look like http://host:port")
        if urls.count(url) > 1:
            raise UserError(f"rollout.vllm_servers names {url} twice; name each server once")
    address = rollout.weight_transfer_address
    if not re.fullmatch(_HOST, address):
        raise UserError(f"rollout.weight_transfer_address={shown(address)} must be a host's name or address alone")
    for url in urls if rollout.weight_transfer == "broadcast" else ():
        if is_loopback(address) > is_loopback(str(urlsplit(url).hostname)):
            raise UserError(
                f"rollout.weight_transfer_address={address} cannot be reached from the machine of {url}; set it to an "
                "address of rank 0's machine"
            )


_HOTTEST_OF_VLLM = 2.0  # SamplingParams._verify_args
_HOST = r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}"  # a name or an IPv4 address, or an IPv6 one


def _is_server(url: str) -> bool:
    match = re.fullmatch(rf"https?://({_HOST}|\[[0-9A-Fa-f:.]{{2,45}}\])(:([0-9]{{1,5}}))?", url)
    return match is not None and 0 < int(match[3] or 80) < 2**16 and not match[1].startswith(":")


KEYS_OF_MODE = {
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
