"""KV-cache decoding on the training weights, under every layout (TP, SP, PP, VPP, EP).

Megatron-Core's static inference context holds the cache; its text-generation wrapper refuses interleaved
pipelines and its broadcast helpers insist on CUDA, so the decode loop is here. The rows are decoded in as many cohorts
as there are stages, one behind the other, so that every stage has work at any time.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from chord_megatron.backend.cohort import Cohort
from chord_megatron.backend.groups import ParallelGroups
from chord_megatron.backend.model import unwrap
from chord_megatron.backend.releases import inference_flag
from chord_megatron.backend.router_replay import CompletionRouting, listening
from chord_megatron.ops.sampling import sample_tokens
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
    tell: Callable[[int], None] = lambda ended: None,
) -> list[tuple[Tensor, ...]]:
    """(tokens int32, log-probs float32) of one completion for each prompt, on the host; an end token is part of it.

    record_routing: and, as a third, which experts served the tokens of prompt and completion (RolloutSample.routing).
    tell: is called with each token, and told how many completions have ended.

    A collective of the ranks that share a model (TP x PP); data-parallel replicas run their own batches, and so do
    context-parallel ranks. Under expert parallelism replicas serve each other in every layer: all of them have to call
    it, some perhaps without prompts.
    """
    count = number_of_cohorts(len(prompts), groups)
    bounds = [len(prompts) * index // max(count, 1) for index in range(count + 1)]
    cohorts = [
        Cohort(prompts[start:stop], seeds[start:stop], params, num_chunks=len(chunks), device=groups.device)
        for start, stop in itertools.pairwise(bounds)
    ]
    routers = [unwrap(chunk).routers for chunk in chunks]
    with _inference_mode(chunks), listening(routers if record_routing else []) as heard:
        for cohort in cohorts if record_routing else ():
            cohort.routing = CompletionRouting(heard, routers[0].arch, groups)
        _Pipeline(chunks, cohorts, params, groups, tell).run()
    return [row for cohort in cohorts for row in cohort.results()]


def number_of_cohorts(num_rows: int, groups: ParallelGroups) -> int:
    """One for each stage that there are rows for. Replicas that share experts have equally many, some without rows."""
    return groups.pp_size if groups.ep_size > 1 else min(groups.pp_size, num_rows)


def turn(tick: int, rank: int, num_stages: int, num_chunks: int) -> tuple[int, int] | None:
    """(cohort, chunk) that the stage `rank` runs in a tick; None before the first cohort gets there.

    Cohort c enters in tick c and moves on by one stage a tick, from the last stage to the first one's next chunk.
    """
    rounds, cohort = divmod(tick - rank, num_stages)
    return None if rounds < 0 else (cohort, rounds % num_chunks)


class _Turn(NamedTuple):
    cohort: Cohort
    chunk: int
    is_first: bool  # of the model's chunks: it reads tokens
    is_last: bool  # it gives logits


class _Pipeline:
    """The stages of a model as a ring, around which cohorts walk one behind the other.

    In each tick a stage runs one chunk on one cohort, hands the hidden states on and receives those of the next tick.
    Behind the last chunk a token is drawn and told to all: every stage knows which rows go on, and with that the shape
    of what it receives. With as many cohorts as stages each is back at the first stage in the tick after its token was
    drawn, and no stage is ever idle.
    """

    def __init__(
        self,
        chunks: list[torch.nn.Module],
        cohorts: list[Cohort],
        params: SamplingParams,
        groups: ParallelGroups,
        tell: Callable[[int], None],
    ) -> None:
        self._tell_ended = tell
        self._models = [unwrap(chunk) for chunk in chunks]
        self._cohorts, self._params, self._groups = cohorts, params, groups
        # CUDA sums need not be the same twice; and an expert computes the tensor-parallel ranks' copies of a token as
        # other rows of one matrix. A token that then differs between the ranks would be a deadlock.
        may_differ = groups.device.type == "cuda" or self._models[0].config.num_moe_experts is not None
        self._tp_ranks_may_differ = groups.tp_size > 1 and may_differ

    def run(self) -> None:
        """Until all cohorts are finished."""
        received = None
        for tick in itertools.count():
            if all(cohort.is_finished for cohort in self._cohorts):
                return
            here, last = (self._turn(tick, rank) for rank in (self._groups.pp_rank, self._groups.pp_size - 1))
            output = self._run_chunk(here, received) if here else None
            is_drawn = here is not None and here.is_last
            received = self._hand_on(None if is_drawn else output, self._turn(tick + 1, self._groups.pp_rank))
            if last and last.is_last:
                self._tell(last.cohort, output if is_drawn else None)

    def _turn(self, tick: int, rank: int) -> _Turn | None:
        """What a stage does in a tick; None where it waits."""
        num_stages, num_chunks = self._groups.pp_size, len(self._models)
        place = turn(tick, rank, num_stages, num_chunks)
        if place is None or place[0] >= len(self._cohorts) or self._cohorts[place[0]].is_finished:
            return None
        chunk = rank + num_stages * place[1]
        return _Turn(self._cohorts[place[0]], place[1], chunk == 0, chunk == num_stages * num_chunks - 1)

    def _run_chunk(self, here: _Turn, received: Tensor | None) -> Tensor:
        """The hidden states [new, rows, hidden] of a cohort's new tokens; of the last chunk what is drawn, [alive]."""
        cohort, model = here.cohort, self._models[here.chunk]
        length, cached = cohort.tokens.shape[1], cohort.padding.shape[1]
        columns = torch.arange(cached, device=self._groups.device)
        queries = columns[cached - length :, None]
        if not here.is_first:
            model.set_input_tensor(received)
        output = model(
            input_ids=cohort.tokens,
            position_ids=queries.T.expand(len(cohort.tokens), -1),
            # A padding row sees itself, because a softmax over nothing is NaN.
            attention_mask=(columns > queries) | (cohort.padding[:, None, None, :] & (columns != queries)),
            inference_context=cohort.contexts[here.chunk],
            runtime_gather_output=True,
        )
        cohort.contexts[here.chunk].sequence_len_offset += length
        if cohort.routing is not None:
            cohort.routing.note(cohort.alive, cohort.source, cached)
        return self._draw(cohort, output[:, -1, : model.real_vocab_size]) if here.is_last else output

    def _hand_on(self, sent: Tensor | None, following: _Turn | None) -> Tensor | None:
        """Send hidden states to the next stage, and receive what the turn that follows here begins with.

        Odd stages receive first: senders that wait for one another all around the ring would wait for ever.
        """
        group, received = self._groups.pp_group, None
        transfers: list[Callable[[], object]] = []
        if sent is not None:
            transfers.append(partial(dist.send, sent.contiguous(), self._neighbour(+1), group=group))
        if following is not None and not following.is_first:
            config, (rows, length) = self._models[following.chunk].config, following.cohort.tokens.shape
            received = torch.empty(
                (length, rows, config.hidden_size), dtype=config.pipeline_dtype, device=self._groups.device
            )
            transfers.append(partial(dist.recv, received, self._neighbour(-1), group=group))
        for transfer in reversed(transfers) if self._groups.pp_rank % 2 else transfers:
            transfer()
        return received

    def _neighbour(self, offset: int) -> int:
        """Global rank of the next (+1) or previous (-1) stage of the ring."""
        return dist.get_global_rank(self._groups.pp_group, (self._groups.pp_rank + offset) % self._groups.pp_size)

    def _draw(self, cohort: Cohort, logits: Tensor) -> Tensor:
        """The next token of each row that goes on, [alive]. logits: [rows that were read, vocab]."""
        params, rows = self._params, (cohort.alive, cohort.position)
        tokens, cohort.log_probs[rows] = sample_tokens(
            logits[cohort.source],
            cohort.uniforms[rows],
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
        )
        return tokens

    def _tell(self, cohort: Cohort, drawn: Tensor | None) -> None:
        """Give the cohort of every rank the tokens that the last stage has drawn, at its end their log-probs, too."""
        if drawn is None:
            drawn = torch.empty(len(cohort.alive), dtype=torch.int64, device=self._groups.device)
        self._share(drawn)
        cohort.take(drawn)
        self._tell_ended(sum(cohort.num_ended for cohort in self._cohorts))
        if _may_stop(cohort.is_done, self._groups):
            self._share(cohort.log_probs)
            cohort.finish()

    def _share(self, values: Tensor) -> None:
        """On every rank of the model what the last stage has; in place."""
        groups = self._groups
        if self._tp_ranks_may_differ and groups.is_last_stage:
            dist.broadcast(values, dist.get_global_rank(groups.tp_group, 0), group=groups.tp_group)
        if groups.pp_size > 1:
            dist.broadcast(values, groups.last_stage_rank, group=groups.pp_group)


def _may_stop(is_done: bool, groups: ParallelGroups) -> bool:
    """Whether a cohort of this replica may stop: when it is done, and so are those of others that need its experts."""
    if groups.ep_size == 1:
        return is_done
    done = torch.tensor([int(is_done)], device=groups.device)
    dist.all_reduce(done, op=dist.ReduceOp.MIN, group=groups.dp_cp_group)
    return bool(done.item())


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
