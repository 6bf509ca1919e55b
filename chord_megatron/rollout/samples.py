"""What an engine drew, as RolloutSamples on every rank. Tokens and log-probs travel as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from chord_megatron.ops.collectives import all_gather_ragged
from chord_megatron.types import Prompt, RolloutRequest, RolloutSample


class Completion(NamedTuple):
    """One completion, on the host."""

    place: int  # in the generation batch
    tokens: Tensor  # [length] int32, with a sampled end token
    log_probs: Tensor  # [length] float32


def completion(place: int, tokens: Sequence[int], log_probs: Sequence[float]) -> Completion:
    """A completion out of an engine that returns lists."""
    return Completion(place, torch.tensor(tokens, dtype=torch.int32), torch.tensor(log_probs, dtype=torch.float32))


def share_samples(
    request: RolloutRequest, mine: Iterable[Completion], group: dist.ProcessGroup | None, device: torch.device
) -> list[RolloutSample]:
    """The samples of a whole request, of which each rank of `group` drew some. A collective call.

    Every rank has the prompts, so only the completions are sent, in three tensors. group: None = all ranks. device: of
    the group's backend.
    """
    group = group or dist.group.WORLD
    assert group is not None, "torch.distributed is not initialized"
    own = list(mine)
    heads = torch.tensor([[c.place, len(c.tokens)] for c in own], dtype=torch.int64).view(-1)
    tokens = torch.cat([torch.empty(0, dtype=torch.int32), *(c.tokens for c in own)])
    log_probs = torch.cat([torch.empty(0), *(c.log_probs for c in own)])
    shares = zip(*(all_gather_ragged(values.to(device), group) for values in (heads, tokens, log_probs)))
    completions = sorted(
        (c for share in shares for c in _split(*(values.cpu() for values in share))), key=lambda c: c.place
    )
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
    )


def _split(heads: Tensor, tokens: Tensor, log_probs: Tensor) -> list[Completion]:
    pairs = heads.view(-1, 2).tolist()
    lengths = [length for _, length in pairs]
    rows = zip(pairs, tokens.split(lengths), log_probs.split(lengths))
    return [Completion(place, row, row_log_probs) for (place, _), row, row_log_probs in rows]
