"""Rows that are decoded together: what they read next, their KV cache, and what was drawn for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from chord_megatron.backend.router_replay import CompletionRouting
from chord_megatron.ops.sampling import uniform_numbers
from chord_megatron.types import SamplingParams


class Cohort:
    """The rows of one decoding batch, the same on every rank of a model but for the cache, which is of its layers.

    A prompt that several rows have is read once; with the first token that is drawn its cache becomes theirs. Without
    prompts a cohort is done from the start, and reads one row of its own for the sake of other replicas.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        num_chunks: int,
        device: torch.device,
    ) -> None:
        self._num_rows, self._limit, self._device = len(prompts), params.max_completion_length, device
        if not prompts:
            prompts, seeds = [[0]], [[0]]
        read, source = distinct(prompts)
        # [rows that are read, new tokens], and which of all their columns so far are padding.
        self.tokens, self.padding = _left_pad(read, device)
        # Of each row that goes on: its place among the prompts, and the row that is read for it.
        self.alive, self.source = torch.arange(len(prompts), device=device), torch.tensor(source, device=device)
        # A cache for each chunk: layer numbers are only unique within one.
        length = self.tokens.shape[1] + self._limit
        self.contexts = [StaticInferenceContext(len(prompts), length) for _ in range(num_chunks)]
        self.uniforms = torch.stack([uniform_numbers(seed, self._limit) for seed in seeds]).to(device)
        self._stop = torch.tensor(params.stop_token_ids, dtype=torch.int64, device=device)
        self.position = 0  # of the token that is drawn next
        self.completions = torch.zeros(len(prompts), self._limit, dtype=torch.int32, device=device)
        self.log_probs = torch.zeros(self.completions.shape, device=device)  # the last stage's, until all are drawn
        self._lengths = torch.zeros(len(prompts), dtype=torch.int64, device=device)
        self._prompt_lengths = [len(prompt) for prompt in prompts]
        self.routing: CompletionRouting | None = None  # None: nobody asks which experts serve these
        self.is_done = self._num_rows == 0  # it needs no more tokens
        self.is_finished = False  # nobody else needs it, either

    def take(self, drawn: Tensor) -> None:
        """The next token of each row that goes on, [alive]; rows that it ends are dropped.

        One row goes on where all are done, until the cohort is finished.
        """
        self.completions[self.alive, self.position] = drawn.to(self.completions.dtype)
        self._lengths[self.alive] += int(not self.is_done)
        self.position += 1
        going_on = ~torch.isin(drawn, self._stop)
        self.is_done = self.is_done or self.position == self._limit or not bool(going_on.any())
        if self.is_done:
            going_on = torch.arange(len(drawn), device=self._device) == 0
        rows = self.source[going_on]
        self.alive, self.tokens = self.alive[going_on], drawn[going_on, None]
        self.source = torch.arange(len(rows), device=self._device)
        if len(rows) != len(self.padding) or not torch.equal(rows, self.source):
            self.padding = self.padding[rows]
            self._select_cached(rows)
        self.padding = torch.cat([self.padding, self.padding.new_zeros(len(rows), 1)], dim=1)

    @property
    def num_ended(self) -> int:
        """Completions that need no more tokens."""
        return self._num_rows if self.is_done else self._num_rows - len(self.alive)

    def finish(self) -> None:
        """Nothing more is drawn: forget the cache."""
        self.is_finished = True
        self.contexts.clear()

    def results(self) -> list[tuple[Tensor, ...]]:
        """(tokens int32, log-probs float32) of each prompt, on the host; with `routing` its experts as a third.

        With `routing` a collective call of the ranks that share a model.
        """
        lengths = self._lengths.tolist()
        kinds = [
            [row[:length] for row, length in zip(rows.cpu(), lengths)] for rows in (self.completions, self.log_probs)
        ]
        if self.routing is not None:
            kinds.append(self.routing.of_completions(self._prompt_lengths, lengths))
        return [*zip(*kinds, strict=True)][: self._num_rows]

    def _select_cached(self, rows: Tensor) -> None:
        """These rows of the cache are the cache. Layer by layer: two copies of one layer are small."""
        for context in self.contexts:
            cache = context.key_value_memory_dict
            for layer in cache:
                cache[layer] = tuple(cached.index_select(0, rows) for cached in cache[layer])


def distinct(prompts: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The prompts without repetitions, and where each one is among them."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    return [*places], [places[tuple(prompt)] for prompt in prompts]


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """[batch, longest] tokens that end together, and True where there is padding.

    One cache offset serves all rows, so prompts end at the same column; rotary positions are relative, so
    where a prompt begins does not matter.
    """
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    padding = torch.ones(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        padding[row, longest - len(prompt) :] = False
    return tokens.to(device), padding.to(device)
