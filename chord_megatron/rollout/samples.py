"""What an engine drew, as RolloutSamples on every rank. Tokens and log-probs travel as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from chord_megatron.ops.collectives import all_gather_ragged
from chord_megatron.rollout.recorded_routing import RoutingForm
from chord_megatron.types import Prompt, RolloutRequest, RolloutSample


class Completion(NamedTuple):
    """One completion, on the host."""

    place: int  # in the generation batch
    tokens: Tensor  # [length] int32, with a sampled end token
    log_probs: Tensor  # [length] float32
    routing: Tensor | None = None  # [prompt + length, layers with experts, top k] int16, as RolloutSample has it


def completion(place: int, tokens: Sequence[int], log_probs: Sequence[float]) -> Completion:
    """A completion out of an engine that returns lists."""
    return Completion(place, torch.tensor(tokens, dtype=torch.int32), torch.tensor(log_probs, dtype=torch.float32))


def share_samples(
    request: RolloutRequest,
    mine: Iterable[Completion],
    group: dist.ProcessGroup | None,
    device: torch.device,
    *,
    routing: RoutingForm | None = None,
) -> list[RolloutSample]:
    """The samples of a whole request, of which each rank of `group` drew some. A collective call.

    Every rank has the prompts, so only the completions are sent, in three tensors. group: None = all ranks. device: of
    the group's backend. routing: of completions that come with theirs.
    """
    group = group or dist.group.WORLD
    assert group is not None, "torch.distributed is not initialized"
    own = list(mine)
    heads = torch.tensor([[c.place, len(c.tokens)] for c in own], dtype=torch.int64).view(-1)
    tokens = torch.cat([torch.empty(0, dtype=torch.int32), *(c.tokens for c in own)])
    log_probs = torch.cat([torch.empty(0), *(c.log_probs for c in own)])
    shares = zip(*(all_gather_ragged(values.to(device), group) for values in (heads, tokens, log_probs)))
    completions = [c for share in shares for c in _split(*(values.cpu() for values in share))]
    if routing is not None:
        prompts = request.repeated
        lengths = [len(prompts[c.place].tokens) + len(c.tokens) for c in completions]
        rows = _share_routing([c.routing for c in own], group, device, routing).split(lengths)
        completions = [c._replace(routing=row) for c, row in zip(completions, rows, strict=True)]
    completions.sort(key=lambda c: c.place)
    return [make_sample(prompt, c, request) for prompt, c in zip(request.repeated, completions, strict=True)]


def make_sample(prompt: Prompt, drawn: Completion, request: RolloutRequest) -> RolloutSample:
    """A completion behind its prompt."""
    start = len(prompt.tokens)
    tokens = torch.cat([torch.tensor(prompt.tokens, dtype=torch.int32), drawn.tokens])
    stopped = len(drawn.tokens) > 0 and int(drawn.tokens[-1]) in request.params.stop_token_ids
    return RolloutSample(
        prompt_id=prompt.id,
        sample_index=drawn.place,
        tokens=tokens,
        response_mask=torch.arange(len(tokens)) >= start,
        rollout_log_probs=torch.cat([torch.zeros(start), drawn.log_probs]),
        policy_version=request.policy_version,
        finish_reason="stop" if stopped else "length",
        routing=drawn.routing,
    )


def _share_routing(
    own: Sequence[Tensor | None], group: dist.ProcessGroup, device: torch.device, form: RoutingForm
) -> Tensor:
    """[tokens of all ranks, layers, top k] int16: each rank's rows, one after the other, behind those before it.

    Layer by layer, so that the device has one at a time, and as bytes: no backend sums int16.
    """
    nothing = torch.empty(0, form.num_layers, form.top_k, dtype=torch.int16)
    mine = torch.cat([nothing, *(row for row in own if row is not None)])
    layers = []
    for layer in mine.unbind(1):
        shares = all_gather_ragged(layer.reshape(-1).view(torch.uint8).to(device), group)
        layers.append(torch.cat(shares).cpu().view(torch.int16).view(-1, form.top_k))
    return torch.stack(layers, dim=1)


def _split(heads: Tensor, tokens: Tensor, log_probs: Tensor) -> list[Completion]:
    pairs = heads.view(-1, 2).tolist()
    lengths = [length for _, length in pairs]
    rows = zip(pairs, tokens.split(lengths), log_probs.split(lengths))
    return [Completion(place, row, row_log_probs) for (place, _), row, row_log_probs in rows]
