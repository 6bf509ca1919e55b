"""Builds the GPTModel of an architecture: layers, head with vocab-parallel log-probs, DDP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from chord_megatron.backend.acceleration import Acceleration, choose_acceleration, find_installed
from chord_megatron.backend.attention import SegmentedSequences
from chord_megatron.backend.groups import ParallelGroups
from chord_megatron.backend.layer_specs import block_spec
from chord_megatron.backend.rope import PositionsBelow, scaled_inverse_frequencies, take_positions
from chord_megatron.backend.router_replay import ChunkRouters
from chord_megatron.backend.transformer_config import transformer_config
from chord_megatron.config import ModelConfig, ParallelConfig
from chord_megatron.ops.linear_log_probs import linear_log_probs
from chord_megatron.types import MicroBatch
from chord_megatron.weights.architecture import LinearRope, Llama3Rope, ModelArchitecture
from chord_megatron.weights.mapping import padded_vocab_size


@dataclass(frozen=True)
class Targets:
    """What the head of the last stage needs to turn hidden states into log-probs, [tokens] each.

    Passed as the model's `labels`, which Megatron-Core hands through unread.
    """

    tokens: Tensor
    temperatures: Tensor
    valid: Tensor  # bool; elsewhere log-probs and entropy are 0
    compute_entropy: bool
    token_of: Tensor | None = None  # int64, where each is predicted from; None: the hidden state in its place


class CausalLM(GPTModel):
    """GPTModel that returns (log_probs, entropy or None) of its Targets, [tokens] each; without Targets, logits."""

    real_vocab_size: int  # without the padding columns
    routers: ChunkRouters

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Targets | None = None, **kwargs: Any) -> Any:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=None, **kwargs)
        hidden_states = hidden_states.squeeze(1)
        if labels.token_of is None:
            return _log_probs(self, hidden_states, labels, self.config.sequence_parallel)
        return _log_probs_of_rows(self, hidden_states, labels, labels.token_of)


def _log_probs_of_rows(model: CausalLM, hidden_states: Tensor, labels: Targets, token_of: Tensor) -> Any:
    """Of those Targets that count, each from its token's hidden state: one may predict several."""
    if model.config.sequence_parallel:  # any rank may have it; the head sums the gradient over TP
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=model.pg_collection.tp
        )
    rows = labels.valid.nonzero().squeeze(1)
    targets = Targets(labels.tokens[rows], labels.temperatures[rows], labels.valid[rows], labels.compute_entropy)
    found = _log_probs(model, hidden_states[token_of[rows]], targets, sequence_parallel=False)
    return [x if x is None else x.new_zeros(len(token_of)).index_copy(0, rows, x) for x in found]


def _log_probs(model: CausalLM, hidden_states: Tensor, labels: Targets, sequence_parallel: bool) -> Any:
    is_tied = model.share_embeddings_and_output_weights
    return linear_log_probs(
        hidden_states,
        model.shared_embedding_or_output_weight() if is_tied else model.output_layer.weight,
        labels.tokens,
        tp_group=model.pg_collection.tp,
        vocab_size=model.real_vocab_size,
        temperature=labels.temperatures,
        valid=labels.valid,
        sequence_parallel=sequence_parallel,
        compute_entropy=labels.compute_entropy,
    )


def build_model_chunks(
    arch: ModelArchitecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    groups: ParallelGroups,
    acceleration: Acceleration | None = None,
) -> list[torch.nn.Module]:
    """This rank's model chunks (one per virtual pipeline stage) on its device, weights not yet set.

    acceleration: None = what is installed.
    """
    config = transformer_config(arch, model, parallel, acceleration or choose_acceleration(find_installed()))
    vp_size = parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in range(vp_size or 1):
        stage = vp_stage if vp_size else None
        chunk = CausalLM(
            config=config,
            transformer_layer_spec=block_spec(config, stage),
            vocab_size=padded_vocab_size(arch.vocab_size, groups.tp_size),
            max_sequence_length=arch.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=arch.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=arch.rope_theta,
            vp_stage=stage,
        ).to(groups.device)
        chunk.real_vocab_size = arch.vocab_size
        chunk.routers = ChunkRouters(chunk, arch, groups)
        _prepare_rotary_embeddings(chunk, arch, groups.device)
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
        _prepare_experts(chunk)
    return chunks


def wrap_data_parallel(
    chunks: list[torch.nn.Module],
    *,
    use_distributed_optimizer: bool,
    overlap_grad_reduce: bool,
    grad_reduce_in_fp32: bool = True,
) -> list[DistributedDataParallel]:
    """DDP around each chunk: gradients accumulate, in fp32 or the model's dtype, and are summed over the ranks."""
    config = unwrap(chunks[0]).config  # the same of all chunks
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=grad_reduce_in_fp32,
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_grad_reduce=overlap_grad_reduce,
    )
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if overlap_grad_reduce:  # only the last micro-batch completes the sums
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def _prepare_rotary_embeddings(chunk: CausalLM, arch: ModelArchitecture, device: torch.device) -> None:
    """Give every rotary embedding the model's frequencies, and have it return the angles of whole sequences.

    Under context parallelism it would cut them for a rank's share where sequences are not packed
    (RotaryEmbedding.forward), but a rank decodes whole ones so. Of packed ones the share is taken at their rotation.

    To be called before the first forward pass: RotaryEmbedding.get_emb remembers the angles of each length. The
    frequencies are no buffer, so nothing moves or casts them later.
    """
    dim, scaling = arch.head_dim if arch.mla is None else arch.mla.qk_rope_head_dim, arch.rope_scaling
    for module in chunk.modules():
        if isinstance(module, RotaryEmbedding):
            module.cp_group = None
            if isinstance(scaling, LinearRope | Llama3Rope):
                module.inv_freq = scaled_inverse_frequencies(dim, arch.rope_theta, scaling).to(device)
            module.register_forward_hook(take_positions)


def _prepare_experts(chunk: torch.nn.Module) -> None:
    """What Megatron-Core leaves undone for experts that are whole on each rank, and for their frozen bias."""
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            # The linear layers mark experts for an optimizer and a gradient sum of their own only where EP > 1, but
            # under TP with EP 1 each rank's copies see other tokens. With the mark always there, the optimizer's
            # checkpoint has one form under every layout, too.
            for parameter in module.experts.parameters():
                parameter.allreduce = False
        if isinstance(module, TopKRouter):
            # Float16Module rounds all buffers; the router undoes it, but only after the weights are loaded.
            module._maintain_float32_expert_bias()  # noqa: SLF001 - has no public name


def run_micro_batch(chunk: torch.nn.Module, batch: MicroBatch, *, compute_entropy: bool) -> Any:
    """What a chunk makes of packed sequences: (log_probs, entropy or None) on the last stage, else hidden states."""
    return chunk(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        attention_mask=None,
        labels=Targets(batch.labels, batch.temperatures, batch.counts, compute_entropy, batch.token_of),
        packed_seq_params=_packed(batch, unwrap(chunk).config.context_parallel_size),
    )


def _packed(batch: MicroBatch, cp_size: int) -> PackedSeqParams:
    if batch.segments is not None:
        bounds = torch.tensor([0, len(batch.input_ids)], dtype=torch.int32)  # on the host, where RoPE reads it
        longest = PositionsBelow(batch.max_seqlen, batch.position_ids)
        return SegmentedSequences(
            "thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest, segments=batch.segments
        )
    bounds, length = batch.cu_seqlens * cp_size, batch.max_seqlen * cp_size  # of whole sequences
    # TransformerEngine asks for these under context parallelism; our padding is part of its sequence.
    padded = bounds if cp_size > 1 else None
    return PackedSeqParams("thd", bounds, bounds, padded, padded, max_seqlen_q=length, max_seqlen_kv=length)


def unwrap(chunk: torch.nn.Module) -> CausalLM:
    """The CausalLM inside DDP and Float16Module."""
    while not isinstance(chunk, CausalLM):
        assert isinstance(chunk.module, torch.nn.Module)
        chunk = chunk.module
    return chunk
