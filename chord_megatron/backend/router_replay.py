"""Which experts the routers of a model choose: heard in one pass over some tokens, given in place of it in another.

A router of Megatron-Core asks the object in its `router_replay` for the top k of its scores. What upstream puts there
(moe/router_replay.py) replays a layer for all tokens of a pass or for none, and keeps what it replays in a list of the
process; docs/decisions/0015-router-replay.md says what that is too little for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from chord_megatron.backend.groups import ParallelGroups
from chord_megatron.batching.routing import rows_in_step
from chord_megatron.types import LIVE, GlobalBatch, MicroBatch, RoutingCounts
from chord_megatron.weights.architecture import ModelArchitecture

TopK = Callable[..., tuple[Tensor, Tensor]]  # (scores, k, num_groups=, group_topk=) -> (scores, experts) of each token


class Heard(NamedTuple):
    """What the router of a layer chose."""

    batch: MicroBatch | None  # None: no micro-batch, but the tokens of completions
    layer: int  # among those that have experts
    experts: Tensor  # [tokens of this rank, top k] int16


class ChunkRouters:
    """The routers of one model chunk."""

    def __init__(self, chunk: GPTModel, arch: ModelArchitecture, groups: ParallelGroups) -> None:
        self.batch: MicroBatch | None = None  # under way
        self.heard: list[Heard] | None = None  # None: nobody listens
        self.arch = arch
        self._tp_rank = groups.tp_rank
        shape = len(arch.moe_layers), arch.moe.num_experts if arch.moe else 0
        self._load = torch.zeros(shape, dtype=torch.int64, device=groups.device)
        # Choices, and those that differ from the router's own.
        self._replayed = torch.zeros(2, dtype=torch.int64, device=groups.device)
        self.can_be_heard = arch.moe is not None and not chunk.config.moe_router_fusion  # a fused one asks nobody
        for router in (module for module in chunk.modules() if isinstance(module, TopKRouter)):
            assert router.layer_number is not None
            router.router_replay = _LayerChoice(self, arch.moe_layers.index(router.layer_number - 1))
        if chunk.config.recompute_granularity is not None:
            chunk.decoder.register_forward_hook(self._remember)

    @contextmanager
    def running(self, batch: MicroBatch) -> Iterator[None]:
        """Within, the tokens are those of the micro-batch."""
        self.batch = batch
        yield
        self.batch = None

    def _remember(self, decoder: torch.nn.Module, arguments: Any, hidden_states: Tensor) -> None:
        """Have the backward pass run its layers again as those of this micro-batch: a pipeline has begun others."""
        batch = self.batch
        if batch is not None and hidden_states.requires_grad:
            hidden_states.register_hook(lambda gradient: setattr(self, "batch", batch))

    def choose(self, layer: int, live: Tensor) -> Tensor:
        """The experts of a layer's tokens, of which the router itself would choose `live`; [tokens, top k] both."""
        given = self.batch.routing if self.batch is not None else None
        chosen, differs = live, None
        if given is not None:
            given = self._of_this_rank(given[:, layer], len(live)).to(live.dtype)
            is_given = given[:, :1] != LIVE
            differs = is_given & ~(given[:, :, None] == live[:, None, :]).any(-1)
            # The same experts stay in the router's own order, in which rounding sums up their weights.
            chosen = torch.where(differs.any(-1, keepdim=True), given, live)
        if self.heard is not None:
            self.heard.append(Heard(self.batch, layer, chosen.to(torch.int16)))
        # Once in each update: passes without a gradient are others, or will be run again for theirs.
        if self.batch is not None and torch.is_grad_enabled():
            is_token = self._of_this_rank(self.batch.is_token, len(live))
            self._load[layer].index_add_(0, chosen.flatten(), is_token.repeat_interleave(chosen.shape[1]).long())
            if differs is not None:
                self._replayed += torch.stack([is_given.expand_as(differs).sum(), differs.sum()])
        return chosen

    def _of_this_rank(self, values: Tensor, count: int) -> Tensor:
        """Its slice under sequence parallelism."""
        return values if len(values) == count else values[self._tp_rank * count :][:count]

    def take_counts(self) -> tuple[Tensor, Tensor]:
        """(`RoutingCounts.load`, [replayed, differing]) since the last time; this rank's part."""
        counts = self._load.clone(), self._replayed.clone()
        self._load.zero_()
        self._replayed.zero_()
        return counts


class _LayerChoice:
    """What stands in a router's `router_replay`."""

    def __init__(self, chunk: ChunkRouters, layer: int) -> None:
        self._chunk, self._layer = chunk, layer

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default_compute_topk: TopK
    ) -> tuple[Tensor, Tensor]:
        """(scores of the experts, the experts), [tokens, top k] both: what topk_routing_with_score_function asks for.

        The scores are those of this pass, whatever chose the experts: their weights, and the gradient of the router.
        """
        values, live = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        chosen = self._chunk.choose(self._layer, live)
        return (values, live) if chosen is live else (scores.gather(1, chosen), chosen)


def count_routing(chunks: Sequence[ChunkRouters]) -> RoutingCounts | None:
    """The counts of all ranks since the last time; None where nothing can be heard. A collective call of all ranks."""
    if not chunks[0].can_be_heard:
        return None
    load, replayed = (torch.stack([*values]).sum(0) for values in zip(*(chunk.take_counts() for chunk in chunks)))
    for values in (load, replayed):
        dist.all_reduce(values)
    return RoutingCounts(load.cpu(), *replayed.tolist())


@contextmanager
def listening(chunks: Sequence[ChunkRouters]) -> Iterator[list[Heard]]:
    """Within, the list grows by what each of their routers chooses."""
    heard: list[Heard] = []
    for chunk in chunks:
        chunk.heard = heard
    try:
        yield heard
    finally:
        for chunk in chunks:
            chunk.heard = None


def of_samples(
    heard: Iterable[Heard], batch: GlobalBatch, arch: ModelArchitecture, groups: ParallelGroups
) -> list[Tensor]:
    """What was heard in a pass over a batch: [length, layers, top k] int16 of each of its samples, on every rank.

    A collective call of all ranks. Tokens that the pass did not have are LIVE.
    """
    table = _Table(sum(batch.lengths), arch, groups.device)
    rows_of = cache(partial(rows_in_step, lengths=batch.lengths))
    for micro_batch, layer, experts in heard:
        assert micro_batch is not None
        is_slice = len(experts) < len(micro_batch.input_ids)  # else each tensor-parallel rank has them all
        if is_slice or groups.tp_rank == 0:
            places, tokens = rows_of(micro_batch)
            tokens = tokens - groups.tp_rank * len(experts) * is_slice
            is_here = (tokens >= 0) & (tokens < len(experts))
            table.write(layer, places[is_here], experts[tokens[is_here]])
    return [*table.merged([None]).split(batch.lengths)]


class CompletionRouting:
    """The experts that serve the tokens of a batch of completions while it is drawn."""

    def __init__(self, heard: list[Heard], arch: ModelArchitecture, groups: ParallelGroups) -> None:
        """heard: what the routers' choices are added to, and taken from after each step."""
        self._heard, self._arch, self._groups = heard, arch, groups
        self._passes: list[tuple[Tensor, Tensor, int, list[int], Tensor]] = []

    def note(self, rows: Tensor, source: Tensor, columns: int) -> None:
        """After a forward pass of a chunk over the newest tokens of some rows, which now have so many columns.

        rows: [n] of the completions that they are for; source: [n] which of those that were read is for each.
        """
        layers = [heard.layer for heard in self._heard]
        if layers and self._groups.tp_rank == 0:  # the others' are copies, which may differ where scores are close
            experts = torch.stack([heard.experts for heard in self._heard]).cpu()
            self._passes.append((rows.cpu(), source.cpu(), columns, layers, experts))
        self._heard.clear()

    def of_completions(self, prompt_lengths: Sequence[int], lengths: Sequence[int]) -> list[Tensor]:
        """[prompt + completion, layers, top k] int16 of each; LIVE the last token, which the model has not read.

        Prompts end at the same column (cohort.py, _left_pad). A collective call of the ranks that share a model.
        """
        prompts, totals = torch.tensor(prompt_lengths), torch.tensor(prompt_lengths) + torch.tensor(lengths)
        starts, firsts = totals.cumsum(0) - totals, max(prompt_lengths) - prompts  # of each row: place, column
        table = _Table(int(totals.sum()), self._arch, self._groups.device)
        for rows, source, columns, layers, experts in self._passes:
            of_read = experts.unflatten(1, (-1, int(source.max()) + 1))  # [layers, new, rows read, top k]
            new = of_read.shape[1]
            tokens = torch.arange(columns - new, columns)[:, None] - firsts[rows]  # [new, n]: which of the sequence's
            is_read = (tokens >= 0) & (tokens < totals[rows] - 1)
            for layer, values in zip(layers, of_read[:, :, source]):
                table.write(layer, (starts[rows] + tokens)[is_read], values[is_read])
        return [*table.merged([self._groups.tp_group, self._groups.pp_group]).split(totals.tolist())]


class _Table:
    """Tokens by layers, of which each rank has a part."""

    def __init__(self, num_tokens: int, arch: ModelArchitecture, device: torch.device) -> None:
        assert arch.moe is not None
        self._shape, self._device = (num_tokens, arch.moe.experts_per_token), device
        self._parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in arch.moe_layers]

    def write(self, layer: int, places: Tensor, experts: Tensor) -> None:
        """places: [n] of the tokens; experts: [n, top k]."""
        self._parts[layer].append((places, experts))

    def merged(self, groups: Iterable[dist.ProcessGroup | None]) -> Tensor:
        """[tokens, layers, top k] int16 on the host: what one rank or another has written, else LIVE.

        groups: those whose ranks have the parts; None: all ranks. Layer by layer, so that the device has one at a time.
        """
        return torch.stack([self._merged_layer(parts, list(groups)) for parts in self._parts], dim=1)

    def _merged_layer(self, parts: list[tuple[Tensor, Tensor]], groups: list[dist.ProcessGroup | None]) -> Tensor:
        # Neither NCCL nor gloo sums int16. 0 is what nobody has written.
        values = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        for places, experts in parts:
            values[places.to(self._device)] = (experts - LIVE).to(self._device, torch.int32)
        for group in groups:
            dist.all_reduce(values, group=group)
        return (values + LIVE).to("cpu", torch.int16)
