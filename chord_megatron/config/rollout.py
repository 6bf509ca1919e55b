"""Who draws completions, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from chord_megatron.config.base import Group
from chord_megatron.config_types import NonNegative, PathName, Positive, PositiveNumber, Seconds, Temperature, Text


class RolloutConfig(Group):
    engine: Literal["megatron", "replay", "vllm"] = "megatron"
    """KV-cache decoding on the training weights; or `replay`, or `vllm` ([docs/rollouts.md](rollouts.md))"""
    num_generations: Positive = 8
    """completions of each prompt: the group; at least 2 unless mu is 1 throughout"""
    temperature: Temperature = 1.0
    """0.01 to 100, with vLLM to 2; of sampler, log-probs, entropy and ratios alike"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """what is drawn from: the likeliest tokens that hold so much together, after `top_k`, as in transformers and vLLM;
    log-probs are taken before it; 1 = all
    """
    top_k: NonNegative = 0
    """what is drawn from: so many of the likeliest tokens; 0 = all"""
    max_completion_length: Positive = 256
    """tokens"""
    stop_token_ids: list[NonNegative] | None = Field(default=None, min_length=1)
    """tokens of the model's vocabulary; `null` = what the chat template writes behind answers, and the end tokens of
    tokenizer and generation config
    """
    max_batch_size: Positive = 256
    """completions decoded at once by each replica of the model: a data-parallel or context-parallel rank"""
    record_to: PathName | None = None
    """jsonl file of every rollout of the run; a log-prob that is no number is `null` in it"""
    replay_from: PathName | None = None
    """such a file, for `engine: replay`"""
    router_replay: Literal["trainer", "sampler"] | None = None
    """models with experts: a rollout's updates have the experts of its first pass in the trainer (`trainer`), or of
    the sampler ([rollouts](rollouts.md#router-replay)); `null` = what the routers choose then
    """
    vllm_mode: Literal["colocate", "server"] | None = None
    """`colocate` (in the trainer's processes) or `server`; for `engine: vllm`"""
    vllm_tensor_parallel_size: Positive = 1
    """colocate: ranks an engine; independent of the trainer's layout"""
    vllm_gpu_memory_utilization: float = Field(default=0.4, gt=0, le=1)
    """colocate: share of each GPU that the engine takes"""
    vllm_enforce_eager: bool = False
    """colocate: no CUDA graphs"""
    sleep_level: Literal[0, 1, 2] = 0
    """colocate: while training the engine gives its memory back; 1 keeps its weights on the host, 2 drops them"""
    offload_optimizer: bool = False
    """colocate: optimizer state and gradients are on the host while completions are drawn"""
    offload_model: bool = False
    """colocate: the training weights are on the host while completions are drawn"""
    vllm_servers: list[Text] | None = None
    """server: `['http://host:port', ...]`"""
    vllm_server_timeout: Seconds = 600.0
    """server: seconds for one completion, and for servers to come back"""
    weight_transfer: Literal["files", "broadcast"] = "files"
    """server: how weights get there: `files`, or `broadcast` (NCCL between GPUs, gloo without)"""
    weight_transfer_dir: PathName = "/dev/shm"
    """files: where they are handed over: memory on one node; across nodes a directory on a shared disk"""
    weight_transfer_address: Text = "127.0.0.1"
    """broadcast: the address of rank 0's machine, as the servers reach it"""
    max_staleness: Literal[0, 1] = 0
    """server: 1 draws the next batch while this one is trained on"""
    consistency_threshold: PositiveNumber | None = 0.05
    """vllm: after each update both sides score 8 prompts; largest mean difference of log-probs; `null` = no check"""
    consistency_action: Literal["stop", "warn"] = "stop"
    """what happens above it: `stop` or `warn`"""
