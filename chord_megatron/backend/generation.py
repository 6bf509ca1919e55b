"""KV-cache decoding on the training weights, under every layout (TP, SP, PP, VPP, EP).

Megatron-Core's static inference context holds the cache; its text-generation wrapper refuses interleaved
pipelines and its broadcast helpers insist on CUDA, so the decode loop is here: each stage receives, runs its
chunk and sends; the last stage samples and broadcasts the tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from chord_megatron.backend.groups import ParallelGroups
from chord_megatron.backend.model import unwrap
from chord_megatron.backend.releases import inference_flag
from chord_megatron.backend.router_replay import CompletionRouting, listening
from chord_megatron.ops.sampling import sample_tokens, uniform_numbers
from chord_megatron.types import SamplingParams

# What makes a module of Megatron-Core split sequences over TP (transformer/utils.py, _init_sequence_parallel_cache).
_SPLITTING = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@torch.no_grad()
def generate_batch(
    chunks: list[torch.nn.Module],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    params: SamplingParams,
    groups: ParallelGroups,
    *,
    record_routing: bool = False,
) -> list[tuple[Tensor, ...]]:
    """(tokens int32, log-probs float32) of one completion for each prompt, on the host; an end token is part of it.

    record_routing: and, as a third, which experts served the tokens of prompt and completion (RolloutSample.routing).

    A collective of the ranks that share a model (TP x PP); data-parallel replicas run their own batches, and so do
    context-parallel ranks. Under expert parallelism replicas serve each other in every layer: all of them have to call
    it, some perhaps without prompts.
    """
    if prompts:
        return _decode(chunks, prompts, seeds, params, groups, is_done=False, record_routing=record_routing)
    if groups.ep_size > 1:
        _decode(chunks, [[0]], [[0]], params, groups, is_done=True, record_routing=False)
    return []


def _decode(
    chunks: list[torch.nn.Module],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    params: SamplingParams,
    groups: ParallelGroups,
    *,
    is_done: bool,
    record_routing: bool,
) -> list[tuple[Tensor, ...]]:
    """See generate_batch. A replica that is done, perhaps from the start, goes on with one row for the others."""
    device = groups.device
    tokens, hidden = _left_pad(prompts, device)
    uniforms = torch.stack([uniform_numbers(seed, params.max_completion_length) for seed in seeds]).to(device)
    stop = torch.tensor(params.stop_token_ids, dtype=torch.int64, device=device)
    decoder = _Decoder(chunks, len(prompts), tokens.shape[1] + params.max_completion_length, groups)
    alive = torch.arange(len(prompts), device=device)  # rows still decoding
    completions = torch.zeros(len(prompts), params.max_completion_length, dtype=torch.int32, device=device)
    log_probs = torch.zeros(completions.shape, device=device)
    lengths = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    # CUDA sums need not be the same twice; and an expert computes the tensor-parallel ranks' copies of a token as
    # other rows of one matrix. A token that then differs between the ranks would be a deadlock.
    may_differ = device.type == "cuda" or unwrap(chunks[0]).config.num_moe_experts is not None
    routers = [unwrap(chunk).routers for chunk in chunks]
    with _inference_mode(chunks), listening(routers if record_routing else []) as heard:
        routing = CompletionRouting(heard, routers[0].arch, groups)
        for position in range(params.max_completion_length):
            logits = decoder.forward(tokens, hidden)
            routing.note(alive, hidden.shape[1])
            drawn, drawn_log_probs = _sample_on_last_stage(
                logits, uniforms[alive, position], params, len(alive), groups, may_differ=may_differ
            )
            if not is_done:
                completions[alive, position] = drawn.to(completions.dtype)
                log_probs[alive, position] = drawn_log_probs
                lengths[alive] += 1
            going_on = ~torch.isin(drawn, stop)
            is_done = is_done or not bool(going_on.any())
            if _may_stop(is_done, groups):
                break
            if is_done:
                going_on = torch.arange(len(alive), device=device) == 0
            if not going_on.all():
                alive, drawn, hidden = alive[going_on], drawn[going_on], hidden[going_on]
                decoder.keep_rows(going_on)
            tokens = drawn[:, None]
            hidden = torch.cat([hidden, hidden.new_zeros(len(alive), 1)], dim=1)
    kept = lengths.tolist()
    drawn_rows = [[row[:length] for row, length in zip(rows.cpu(), kept)] for rows in (completions, log_probs)]
    if record_routing:
        drawn_rows.append(routing.of_completions([len(prompt) for prompt in prompts], kept))
    return [*zip(*drawn_rows, strict=True)]


def _may_stop(is_done: bool, groups: ParallelGroups) -> bool:
    """Whether this replica of the model may stop: when it is done, and so are those that need its experts."""
    if groups.ep_size == 1:
        return is_done
    done = torch.tensor([int(is_done)], device=groups.device)
    dist.all_reduce(done, op=dist.ReduceOp.MIN, group=groups.dp_cp_group)
    return bool(done.item())


class _Decoder:
    """Runs new tokens through all chunks of all stages, keeping the KV cache."""

    def __init__(self, chunks: list[torch.nn.Module], batch_size: int, max_length: int, groups: ParallelGroups) -> None:
        self._models = [unwrap(chunk) for chunk in chunks]
        # A context for each chunk: layer numbers are only unique within one.
        self._contexts = [StaticInferenceContext(batch_size, max_length) for _ in chunks]
        self._groups = groups

    def forward(self, tokens: Tensor, hidden: Tensor) -> Tensor | None:
        """tokens: [batch, new]; hidden: [batch, cached + new], True at left padding.

        Returns the logits of the last position, [batch, vocab], on the last stage and None elsewhere.
        """
        length, cached = tokens.shape[1], hidden.shape[1]
        columns = torch.arange(cached, device=tokens.device)
        queries = columns[cached - length :, None]
        # A padding row sees itself, because a softmax over nothing is NaN.
        mask = (columns > queries) | (hidden[:, None, None, :] & (columns != queries))
        for model, context in zip(self._models, self._contexts):
            if not model.pre_process:
                model.set_input_tensor(self._receive(len(tokens), length, model.config))
            output = model(
                input_ids=tokens,
                position_ids=queries.T.expand(len(tokens), -1),
                attention_mask=mask,
                inference_context=context,
                runtime_gather_output=True,
            )
            context.sequence_len_offset += length
            if not model.post_process:
                self._send(output)
        return output[:, -1, : model.real_vocab_size] if model.post_process else None

    def keep_rows(self, keep: Tensor) -> None:
        """Drop finished rows from the cache."""
        for context in self._contexts:
            context.key_value_memory_dict = {
                layer: (keys[keep], values[keep]) for layer, (keys, values) in context.key_value_memory_dict.items()
            }

    def _receive(self, batch: int, length: int, config: TransformerConfig) -> Tensor:
        """Hidden states [length, batch, hidden] of the stage before, which for later chunks is the ring's last."""
        shape = (length, batch, config.hidden_size)
        hidden_states = torch.empty(shape, dtype=config.pipeline_dtype, device=self._groups.device)
        dist.recv(hidden_states, self._neighbour(-1), group=self._groups.pp_group)
        return hidden_states

    def _send(self, hidden_states: Tensor) -> None:
        dist.send(hidden_states.contiguous(), self._neighbour(+1), group=self._groups.pp_group)

    def _neighbour(self, offset: int) -> int:
        """Global rank of the next (+1) or previous (-1) stage of the ring."""
        return dist.get_global_rank(self._groups.pp_group, (self._groups.pp_rank + offset) % self._groups.pp_size)


def _sample_on_last_stage(
    logits: Tensor | None,
    uniforms: Tensor,
    params: SamplingParams,
    batch_size: int,
    groups: ParallelGroups,
    *,
    may_differ: bool,
) -> tuple[Tensor, Tensor]:
    """Tokens [batch] int64 and log-probs [batch], equal on every rank of the model.

    may_differ: the logits of tensor-parallel ranks, in their last bits.
    """
    if logits is not None:
        tokens, log_probs = sample_tokens(
            logits, uniforms, temperature=params.temperature, top_p=params.top_p, top_k=params.top_k
        )
    else:
        tokens = torch.empty(batch_size, dtype=torch.int64, device=groups.device)
        log_probs = torch.empty(batch_size, dtype=torch.float32, device=groups.device)
    for values in (tokens, log_probs):
        if may_differ and groups.is_last_stage and groups.tp_size > 1:
            dist.broadcast(values, dist.get_global_rank(groups.tp_group, 0), group=groups.tp_group)
        if groups.pp_size > 1:
            dist.broadcast(values, groups.last_stage_rank, group=groups.pp_group)
    return tokens, log_probs


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """[batch, longest] tokens that end together, and True where there is padding.

    One cache offset serves all rows, so prompts end at the same column; rotary positions are relative, so
    where a prompt begins does not matter.
    """
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    hidden = torch.ones(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        hidden[row, longest - len(prompt) :] = False
    return tokens.to(device), hidden.to(device)


@contextlib.contextmanager
def _inference_mode(chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Evaluation mode without sequence parallelism: single tokens cannot be split over TP."""
    models = [unwrap(chunk) for chunk in chunks]
    for model in models:
        model.eval()
    try:
        with inference_flag(), _sequence_parallelism_off(models):
            yield
    finally:
        for model in models:
            model.train()


@contextlib.contextmanager
def _sequence_parallelism_off(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Within, no module splits sequences.

    Megatron-Core's set_model_to_sequence_parallel finds modules in a cache by the id of their model, which another one
    may have that was made after it; and it switches on what was off.
    """
    owners = [owner for model in models for owner in (model.config, *model.modules())]
    on = [(owner, name) for owner in owners for name in _SPLITTING if getattr(owner, name, False)]
    for owner, name in on:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name in on:
            setattr(owner, name, True)
