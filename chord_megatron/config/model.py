"""The model, and how it is spread over processes."""

from __future__ import annotations

from typing import Any, Literal

from chord_megatron.config.base import Group
from chord_megatron.config_types import Minutes, PathName, PipelineLayout, Positive, Recompute


class ModelConfig(Group):
    path: PathName
    """Hugging Face directory (`config.json`, safetensors, tokenizer), what `chord-megatron convert hf-to-megatron`
    made of one, or a name of the hub, `org/name` ([how it is fetched](#a-model-of-the-hub))
    """
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """or `float32`; optimizer state and gradient sums are float32 in both"""
    recompute: Recompute = False
    """activations that the backward pass computes again: `true` or `full`, those of whole layers; or [parts of each
    layer](sizing.md#activations), such as `[core_attn, mlp]`
    """
    recompute_method: Literal["uniform", "block"] | None = None
    """of whole layers, as in Megatron-LM: `uniform`, `recompute_num_layers` at a time; `block`, so many of each stage,
    and the others keep theirs; `null`: `uniform`
    """
    recompute_num_layers: Positive | None = None
    """of whole layers: of `uniform` at a time, of `block` in each stage; `null`: 1"""
    transformer_config: dict[str, Any] = {}
    """fields of Megatron-Core's TransformerConfig, [passed through](#megatron-cores-own-options)"""
    export_bucket_megabytes: Positive = 512
    """full weights that are gathered at a time, for saving and for rollout engines: the memory it takes"""
    trust_remote_code: bool = False
    """for the tokenizer, whose code and vocabulary travel into exports and checkpoints; models never run foreign code
    """

    @property
    def recomputes_layers(self) -> bool:
        """Whether whole layers are computed again."""
        return self.recompute is True or self.recompute == "full"


class ParallelConfig(Group):
    tensor_model_parallel_size: Positive = 1
    """must divide the attention heads, key/value heads and MLP columns; experts stay whole"""
    pipeline_model_parallel_size: Positive = 1
    """pipeline stages; any number up to the layers + 2: the first may hold the embedding alone, the last the head"""
    virtual_pipeline_model_parallel_size: Positive | None = None
    """model chunks of each stage (interleaved schedule); needs PP > 1"""
    pipeline_layout: PipelineLayout = None
    """the layers of each stage in the order of the layers, such as `[3, 4, 4, 2]`; under VPP of PP x VPP virtual
    stages, chunk 0 of every stage first. `auto`: [by what they cost](sizing.md#cutting-the-layers). `null`: the
    same for all, and where that does not come out even, as `auto`
    """
    num_layers_in_first_pipeline_stage: Positive | None = None
    """as in Megatron-LM: the layers of the first stage, all its chunks together; the other stages share the rest
    evenly. Not beside `pipeline_layout`
    """
    num_layers_in_last_pipeline_stage: Positive | None = None
    """the same of the last stage"""
    sequence_parallel: bool = False
    """splits norms over TP; without TP there is nothing to split; models with experts or latent attention need it
    under TP
    """
    context_parallel_size: Positive = 1
    """ranks that share each sequence, for contexts that are too long for one:
    [how](concepts.md#one-sequence-on-several-ranks). Any size; divides the processes beside TP and PP
    """
    expert_model_parallel_size: Positive = 1
    """must divide the experts and the ranks of a pipeline stage (TP x CP x DP), which it spreads them over"""
    distributed_timeout_minutes: Minutes = 30.0
    """the time-out of NCCL and gloo: how long a rank waits for another, at the start too, before the run ends; longer
    than the slowest rollout, evaluation or save
    """
